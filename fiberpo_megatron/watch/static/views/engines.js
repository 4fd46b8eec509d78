// The rollout engines: their states, weights and load after the last step.

import { h, replace } from "../dom.js";
import { count, duration, number } from "../format.js";
import { panelPage } from "../panel_page.js";

export const key = "engines";
export const title = "Engines";

export async function render(container, context) {
  const tables = h("div", {});
  const show = async () => replace(tables, await Promise.all(context.runs.map((run) => ofRun(context, run))));
  context.onUpdate(show);
  await Promise.all([
    show(),
    panelPage(container, context, (sections) => sections.filter((section) => section.key === "engines"), {
      intro: tables,
      empty: "The run has logged no metrics of engines.",
    }),
  ]);
}

async function ofRun(context, run) {
  const states = await context.fetchJson("api/engines", { run: run.key });
  const name = context.runs.length > 1 ? ` · ${run.name}` : "";
  if (!states) {
    return h("section", {}, h("h2", {}, `Engines${name}`), h("p", { class: "empty" }, "The folder has no engines.json: no step with engines has ended, or the run replays stored trajectories."));
  }
  const asked = `asked after step ${count(states.step + 1)}, ${duration(Math.max(0, Date.now() / 1000 - states.time))} ago`;
  return h("section", {}, h("h2", {}, `Engines${name}`, h("small", {}, asked)), h("div", { class: "scroll" }, table(states)));
}

function table(states) {
  const head = ["engine", "state", "weights", "running", "queued", "KV cache", "prefix hits", "tokens/s", "answered in"];
  return h(
    "table",
    { class: "engines" },
    h("thead", {}, h("tr", {}, head.map((text, place) => h("th", { class: place > 1 ? "number" : null }, text)))),
    h("tbody", {}, states.engines.map((engine) => row(engine, states))),
  );
}

function row(engine, states) {
  const newest = String(states.step + 1);
  const behind = engine.weight_version !== null && /^\d+$/.test(engine.weight_version) && engine.weight_version !== newest;
  const share = (value) => (value === null ? "–" : `${number(100 * value)} %`);
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, engine.address),
    h("td", {}, h("span", { class: `state ${engine.state === "serving" ? "running" : "lost"}` }, engine.state), engine.detail && h("small", {}, engine.detail)),
    h("td", { class: "number" }, engine.weight_version ?? "–", behind && h("small", {}, `newest: ${newest}`)),
    h("td", { class: "number" }, number(engine.running)),
    h("td", { class: "number" }, number(engine.queued)),
    h("td", { class: "number" }, share(engine.token_usage), engine.token_usage !== null && h("span", { class: "meter" }, h("span", { style: { width: `${100 * engine.token_usage}%` } }))),
    h("td", { class: "number" }, share(engine.cache_hit_rate)),
    h("td", { class: "number" }, number(engine.generation_tokens_per_second)),
    h("td", { class: "number" }, duration(engine.answered_in_s)),
  );
}
