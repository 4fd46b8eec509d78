// A view that is made of panels: a bar of controls, and the sections that `pick` chooses of those that the runs have.

import { Charts } from "./charts.js";
import { h, replace } from "./dom.js";
import { count } from "./format.js";

const SMOOTH = [
  ["auto", "smooth: auto"],
  ["0", "smooth: off"],
  ["5", "smooth: 5 steps"],
  ["25", "smooth: 25 steps"],
  ["100", "smooth: 100 steps"],
  ["1000", "smooth: 1,000 steps"],
];

/** Render sections of panels. `pick(sections)` returns the sections to show; `options` may have filter (whether there is
 * a box to search metrics), intro (an element) and empty (what is said when nothing is picked). */
export async function panelPage(container, context, pick, options = {}) {
  const charts = new Charts(context, { smooth: readSmooth(context.parameters.smooth) });
  const body = h("div", {});
  container.append(controls(context, charts, options, () => show(true)), options.intro ?? "", body);
  let shown = "";
  let sections = [];

  async function load() {
    sections = await context.fetchJson("api/panels", { run: context.runs.map((run) => run.key) });
    show(false);
  }

  function show(again) {
    const words = (context.parameters.filter ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const picked = search(pick(sections), words);
    const now = JSON.stringify(picked);
    if (now === shown && !again) return;
    shown = now;
    charts.clear();
    replace(body);
    if (!picked.length) {
      const text = words.length ? `No chart has ${words.join(" and ")} in its title or its metrics.` : (options.empty ?? "No metrics yet.");
      body.append(h("p", { class: "empty" }, text));
    }
    for (const section of picked) {
      const grid = h("div", { class: "charts" });
      body.append(h("section", {}, picked.length > 1 && h("h2", { id: `section-${section.key}` }, section.title), grid));
      section.panels.forEach((panel) => charts.add(grid, panel));
      if (section.cut) body.append(h("p", { class: "note" }, "The section has more charts than are shown; search for their metrics."));
    }
  }

  context.onUpdate(load);
  await load();
  return charts;
}

function readSmooth(text) {
  return text === undefined || text === "auto" ? "auto" : Number(text) || 0;
}

function search(sections, words) {
  if (!words.length) return sections;
  const has = (section, panel) => {
    const text = [section.title, panel.title, panel.note, ...panel.curves.flatMap((curve) => [curve.metric, curve.label])].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  return sections
    .map((section) => ({ ...section, panels: section.panels.filter((panel) => has(section, panel)) }))
    .filter((section) => section.panels.length);
}

function controls(context, charts, options, refilter) {
  const smooth = h(
    "select",
    {
      "aria-label": "Moving mean",
      onchange: (event) => {
        context.setParameters({ smooth: event.target.value === "auto" ? null : event.target.value });
        charts.setSmooth(readSmooth(event.target.value));
      },
    },
    SMOOTH.map(([value, label]) => h("option", { value, selected: value === (context.parameters.smooth ?? "auto") }, label)),
  );
  const log = h(
    "button",
    {
      type: "button",
      "aria-pressed": "false",
      title: "Logarithmic axes in all charts of lines",
      onclick: () => {
        const on = log.getAttribute("aria-pressed") !== "true";
        log.setAttribute("aria-pressed", String(on));
        charts.setLog(on);
      },
    },
    "log",
  );
  const filter =
    options.filter &&
    h("input", {
      type: "search",
      placeholder: "search metrics, for example: ratio",
      "aria-label": "Search charts",
      value: context.parameters.filter ?? "",
      oninput: (event) => {
        context.setParameters({ filter: event.target.value || null });
        refilter();
      },
    });
  return h("div", { class: "controls" }, filter, smooth, log, rangeControl(context));
}

/** Return the control that shows the range of steps, and resets it. */
export function rangeControl(context) {
  const text = h("span", { class: "muted" });
  const reset = h("button", { type: "button", onclick: () => context.range.set(null) }, "show all steps");
  const write = (range) => {
    text.textContent = range ? `steps ${count(range[0])} to ${count(range[1])}` : "drag in a chart to zoom";
    reset.hidden = !range;
  };
  context.range.subscribe(write);
  write(context.range.get());
  return h("span", { class: "range" }, text, reset);
}
