// Elements are made by calls, and texts become text nodes: nothing that a run contains is ever parsed as HTML.

/** Return a new element. `attributes` are set by name; `on...` entries are listeners, `class` is the class attribute,
 * a false or null value leaves the attribute out. Children are elements, texts, numbers, or lists of these. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Return a new SVG element, like `h`. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(printable(String(child))));
  }
}

/** Put `children` in the place of what an element contains. */
export function replace(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

// Control and format characters can reverse or hide text; they are shown as escapes, except line ends and tabs.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** Return a text in which every hidden character is an escape, as in the console and in the report. */
export function printable(text) {
  return text.replace(HIDDEN, (c) => {
    if (c === "\n" || c === "\t") return c;
    const code = c.codePointAt(0).toString(16);
    return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`;
  });
}
