// Requests to the server. All addresses are relative, because the page's own address may begin with a token.

/** This error is an answer of the server that says why something is not there. */
export class NotThere extends Error {
  name = "NotThere";
}

/** Return the JSON at `path`. `parameters` is an object; a list becomes one parameter for each entry, null none.
 * Throws NotThere with the server's message, and Error when the server cannot be reached. */
export async function fetchJson(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined) query.append(name, String(one));
    }
  }
  const answer = await fetch(query.size ? `${path}?${query}` : path, { signal, cache: "no-cache" });
  if (answer.status === 404) throw new NotThere((await answer.json()).error ?? "not found");
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}
