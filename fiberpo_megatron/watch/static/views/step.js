// The phases of a step as bars: measured beside what a plan expects.

import { h, replace } from "../dom.js";
import { count, duration, number } from "../format.js";

export const key = "step";
export const title = "Step time";

const OVER = [1, 10, 50, 200];

export async function render(container, context) {
  const chosen = { step: toStep(context.parameters.step), over: Number(context.parameters.over) || 10 };
  const bodies = context.runs.map(() => h("section", {}));
  const bar = h("div", { class: "controls" });
  container.append(bar, ...bodies);
  let ends = { first: 1, last: 1, step: 1 };

  const show = async () => {
    const found = await Promise.all(context.runs.map((run) => phasesOf(context, run, chosen)));
    found.forEach((one, place) => replace(bodies[place], ofRun(context.runs[place], one, context.runs.length > 1)));
    ends = found.find((one) => one !== null) ?? ends;
    input.value = String(ends.step);
    input.max = String(ends.last);
    slider.min = String(ends.first);
    slider.max = String(ends.last);
    slider.value = String(ends.step);
    latest.setAttribute("aria-pressed", String(chosen.step === null));
  };
  const choose = (changes) => {
    Object.assign(chosen, changes);
    context.setParameters({ step: chosen.step, over: chosen.over === 10 ? null : chosen.over });
    return show();
  };

  const input = h("input", { type: "number", min: 1, "aria-label": "Step", onchange: (event) => choose({ step: toStep(event.target.value) }) });
  const slider = h("input", { type: "range", "aria-label": "Step", oninput: (event) => choose({ step: Number(event.target.value) }) });
  const latest = h("button", { type: "button", onclick: () => choose({ step: null }) }, "latest");
  const over = h(
    "select",
    { "aria-label": "Steps that are averaged", onchange: (event) => choose({ over: Number(event.target.value) }) },
    OVER.map((steps) => h("option", { value: steps, selected: steps === chosen.over }, steps === 1 ? "this step alone" : `mean of ${steps} steps`)),
  );
  replace(
    bar,
    h("button", { type: "button", "aria-label": "Previous step", onclick: () => choose({ step: Math.max(ends.first, ends.step - 1) }) }, "‹"),
    input,
    h("button", { type: "button", "aria-label": "Next step", onclick: () => choose({ step: Math.min(ends.last, ends.step + 1) }) }, "›"),
    slider,
    latest,
    over,
  );
  context.onUpdate(() => chosen.step === null && show());
  await show();
}

function toStep(text) {
  const step = Number(text);
  return text === undefined || text === "" || !Number.isFinite(step) ? null : Math.round(step);
}

async function phasesOf(context, run, chosen) {
  try {
    return await context.fetchJson("api/phases", { run: run.key, step: chosen.step, over: chosen.over });
  } catch (error) {
    if (error.name === "NotThere") return null;
    throw error;
  }
}

function ofRun(run, found, named) {
  const name = named ? ` · ${run.name}` : "";
  if (!found) return [h("h2", {}, `Phases${name}`), h("p", { class: "empty" }, "No step of training has ended yet.")];
  const steps = found.from === found.step ? `Step ${count(found.step)}` : `Steps ${count(found.from)} to ${count(found.step)}, mean`;
  const kinds = ["measured", "expected", "planned"].filter((kind) => found.total[kind] !== null && found.total[kind] !== undefined);
  const widest = Math.max(...kinds.map((kind) => total(found, kind)));
  return [
    h("h2", {}, `${steps}${name}`),
    h("div", { class: "phases", role: "group", "aria-label": "Phases as bars" }, kinds.map((kind) => bar(found, kind, widest))),
    kinds.length === 1 && h("p", { class: "note" }, "The run has no plan beside its times: it knows no GPU of its machine, and no file of `fiberpo calibrate` is given."),
    found.verdict.length > 0 && h("ul", { class: "verdict" }, found.verdict.map((sentence) => h("li", {}, sentence))),
    table(found, kinds),
  ];
}

/** Return a bar's length: all its phases, which may be a little more than the run's own total. */
function total(found, kind) {
  return Math.max(found.total[kind] ?? 0, found.phases.reduce((sum, phase) => sum + (phase[kind] ?? 0), 0));
}

const LABELS = { measured: "measured", expected: "expected with these trajectories", planned: "planned before the start" };

function bar(found, kind, widest) {
  const parts = found.phases.filter((phase) => phase[kind] > 0);
  return h(
    "div",
    { class: "phase-row" },
    h("div", { class: "phase-label" }, LABELS[kind], h("b", {}, duration(total(found, kind)))),
    h(
      "div",
      { class: "phase-bar" },
      parts.map((phase) => {
        const share = (100 * phase[kind]) / widest;
        const text = `${phase.name.replaceAll("_", " ")}: ${duration(phase[kind])}`;
        return h(
          "span",
          { style: { width: `${share}%`, background: phase.colour, color: ink(phase.colour) }, title: text, role: "img", "aria-label": text },
          share > 9 && phase.name.replaceAll("_", " "),
        );
      }),
    ),
  );
}

/** Return black or white, whichever is read better on a colour. */
function ink(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 150 ? "#1f2937" : "#ffffff";
}

function table(found, kinds) {
  const planned = kinds.includes("expected");
  const slowest = Object.keys(found.slowest).length > 0;
  const whole = total(found, "measured");
  const head = ["phase", "measured", "share", ...(planned ? ["expected", "planned", "over expected"] : []), ...(slowest ? ["slowest rank", "above the median"] : [])];
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { class: "phase-table" },
      h("thead", {}, h("tr", {}, head.map((text, place) => h("th", { class: place ? "number" : null }, text)))),
      h("tbody", {}, found.phases.map((phase) => row(phase, found, planned, slowest, whole))),
    ),
  );
}

function row(phase, found, planned, slowest, whole) {
  const off = phase.expected ? phase.measured / phase.expected - 1 : null;
  const rank = found.slowest[phase.name];
  const parts = Object.entries(phase.parts).map(([name, seconds]) => `${name.replaceAll("_", " ")} ${duration(seconds)}`);
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, h("span", { class: "swatch", style: { background: phase.colour } }), phase.name.replaceAll("_", " "), parts.length > 0 && h("small", {}, parts.join(", "))),
    h("td", { class: "number" }, duration(phase.measured)),
    h("td", { class: "number" }, whole ? `${number((100 * phase.measured) / whole)} %` : "–"),
    planned && [
      h("td", { class: "number" }, duration(phase.expected)),
      h("td", { class: "number" }, duration(phase.planned)),
      h("td", { class: `number ${off !== null && off > 0.1 ? "over" : ""}` }, off === null ? "–" : `${off > 0 ? "+" : "−"}${number(Math.abs(100 * off), 2)} %`),
    ],
    slowest && [h("td", { class: "number" }, rank ? rank.rank : "–"), h("td", { class: "number" }, duration(rank?.excess))],
  );
}
