// What a run is and where it stands; of several runs also how they differ.

import { Charts } from "../charts.js";
import { h, replace } from "../dom.js";
import { count, number } from "../format.js";
import { readable } from "../plot.js";
import { rangeControl } from "../panel_page.js";

export const key = "overview";
export const title = "Overview";

const FIRST_PANELS = ["accuracy", "reward", "entropy", "response-length", "loss"];
const MORE_PANELS = ["importance-ratio", "drift-by-cause", "seconds-per-phase"];

export async function render(container, context) {
  const status = h("div", { class: "status" });
  const grid = h("div", { class: "charts" });
  const settings = h("div", {});
  container.append(status, h("section", {}, h("div", { class: "controls" }, rangeControl(context)), grid), settings);
  const charts = new Charts(context);
  let drawn = "";

  async function show(runs) {
    const [summaries, sections] = await Promise.all([
      Promise.all(runs.map((run) => context.fetchJson("api/summary", { run: run.key }))),
      context.fetchJson("api/panels", { run: runs.map((run) => run.key) }),
    ]);
    replace(status, runs.length > 1 ? table(runs, summaries) : one(context, runs[0], summaries[0]));
    const panels = sections.flatMap((section) => section.panels);
    const picked = [...FIRST_PANELS, ...MORE_PANELS].map((wanted) => panels.find((panel) => panel.key === wanted)).filter(Boolean);
    const now = JSON.stringify(picked);
    if (now === drawn) return;
    drawn = now;
    charts.clear();
    picked.forEach((panel) => charts.add(grid, panel));
  }

  context.onUpdate(show);
  await Promise.all([show(context.runs), showSettings(settings, context)]);
}

function one(context, run, figures) {
  const kind = run.kinds.train ?? run.kinds.sft;
  const share = run.planned_steps && kind ? Math.min(1, kind.last / run.planned_steps) : null;
  return [
    h(
      "div",
      { class: "about" },
      h("p", {}, h("span", { class: `state ${run.state.name}` }, run.state.name), " ", run.state.detail),
      h("p", { class: "muted path" }, run.folder),
      share !== null && h("progress", { max: 1, value: share, "aria-label": `${count(kind.last)} of ${count(run.planned_steps)} steps` }),
      problems(run),
      run.alarms > 0 && h("p", {}, h("a", { href: "#alarms" }, run.alarms === 1 ? "1 alarm is raised" : `${run.alarms} alarms are raised`)),
    ),
    h("dl", { class: "figures" }, figures.map((figure) => h("div", {}, h("dd", {}, figure.text), h("dt", {}, figure.label)))),
  ];
}

function problems(run) {
  const odd = run.odd_lines === 1 ? "One line of metrics.jsonl is no record, and is left out." : `${count(run.odd_lines)} lines of metrics.jsonl are no records, and are left out.`;
  return [run.problem && h("p", { class: "problem" }, run.problem), run.odd_lines > 0 && h("p", { class: "problem" }, odd)];
}

/** Return the figures of several runs side by side. */
function table(runs, summaries) {
  const labels = new Map(summaries.flat().map((figure) => [figure.key, figure.label]));
  const cell = (figures, key) => figures.find((figure) => figure.key === key)?.text ?? "–";
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { class: "compare" },
      h("thead", {}, h("tr", {}, h("th", {}, ""), runs.map((run) => h("th", { class: "number" }, h("span", { class: "swatch", style: { background: readable(run.colour) } }), run.name)))),
      h(
        "tbody",
        {},
        h("tr", {}, h("th", { scope: "row" }, "state"), runs.map((run) => h("td", { class: "number" }, h("span", { class: `state ${run.state.name}`, title: run.state.detail }, run.state.name)))),
        h("tr", {}, h("th", { scope: "row" }, "alarms raised"), runs.map((run) => h("td", { class: "number" }, number(run.alarms)))),
        [...labels].map(([key, label]) => h("tr", {}, h("th", { scope: "row" }, label), summaries.map((figures) => h("td", { class: "number" }, cell(figures, key))))),
      ),
    ),
  );
}

/** Show the settings; of several runs those that differ first. */
async function showSettings(element, context) {
  const found = await Promise.all(context.runs.map((run) => context.fetchJson("api/config", { run: run.key })));
  const flat = found.map(({ config }) => flatten(config));
  const names = [...new Set(flat.flatMap((settings) => [...settings.keys()]))].sort();
  if (!names.length) return;
  const differ = names.filter((name) => new Set(flat.map((settings) => settings.get(name))).size > 1);
  const rows = (wanted) =>
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "settings" },
        context.runs.length > 1 && h("thead", {}, h("tr", {}, h("th", {}, "setting"), context.runs.map((run) => h("th", {}, run.name)))),
        h("tbody", {}, wanted.map((name) => h("tr", {}, h("th", { scope: "row" }, name), flat.map((settings) => h("td", {}, settings.get(name) ?? "–"))))),
      ),
    );
  replace(
    element,
    context.runs.length > 1 && differ.length > 0 && h("section", {}, h("h2", {}, "Settings that differ"), rows(differ)),
    h("details", {}, h("summary", {}, `All settings (${names.length})`), rows(names)),
  );
}

/** Return a nested table as [dotted name, value as text]. */
function flatten(value, head = "", found = new Map(), depth = 0) {
  const nested = value !== null && typeof value === "object" && depth < 20;
  const list = Array.isArray(value) && !value.some((item) => item !== null && typeof item === "object");
  if (nested && !list && Object.keys(value).length) {
    for (const [name, inner] of Object.entries(value)) {
      flatten(inner, Array.isArray(value) ? `${head}[${name}]` : head ? `${head}.${name}` : name, found, depth + 1);
    }
  } else if (head) {
    found.set(head, typeof value === "string" ? value : JSON.stringify(value));
  }
  return found;
}
