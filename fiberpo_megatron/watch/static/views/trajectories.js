// Trajectories: a list with filters, one of them with its tokens, and the answers of two checkpoints side by side.

import { h, replace } from "../dom.js";
import { count, number } from "../format.js";
import { compare } from "./trajectories_compare.js";
import { filters, readFilters } from "./trajectories_filters.js";
import { showTokens } from "./trajectories_tokens.js";

export const key = "trajectories";
export const title = "Trajectories";

export async function render(container, frame) {
  styleSheet();
  const context = followed(frame);
  const run = context.runs.find((one) => one.key === context.parameters.run) ?? context.runs[0];
  if (!run) {
    replace(container, h("p", { class: "empty" }, "No run is shown."));
    return;
  }
  const steps = await context.fetchJson("api/trajectories/steps", { run: run.key });
  if (!steps.train.length && !steps.eval.length) {
    replace(container, problems(steps.problems), h("p", { class: "empty" }, "No trajectories are recorded in this run (telemetry.rollouts_per_step)."));
    return;
  }
  const view = new View(container, context, run, steps);
  await view.draw();
}

/** Return the context with parameters that follow their changes. */
function followed(frame) {
  const context = { ...frame, parameters: { ...frame.parameters } };
  context.setParameters = (changes) => {
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === undefined) delete context.parameters[name];
      else context.parameters[name] = String(value);
    }
    frame.setParameters(changes);
  };
  return context;
}

class View {
  constructor(container, context, run, steps) {
    Object.assign(this, { container, context, run, steps });
    this.kind = context.parameters.kind === "eval" || !steps.train.length ? "eval" : "train";
    this.mode = context.parameters.mode === "compare" ? "compare" : "list";
    const known = this.known();
    const asked = Number(context.parameters.step);
    this.step = context.parameters.step !== undefined && known.includes(asked) ? asked : known[known.length - 1];
    context.onUpdate(() => this.update());
  }

  /** Return the steps of the chosen kind. */
  known() {
    return this.kind === "eval" ? this.steps.eval : this.steps.train.map(([step]) => step);
  }

  async draw() {
    this.status = h("p", { class: "note", role: "status" });
    this.list = h("div", { class: "tr-list" });
    this.detail = h("div", { class: "tr-detail" });
    this.choices = h("div", { class: "controls" });
    this.filters = h("div", { class: "controls tr-filters" });
    this.drawChoices();
    const parts = [this.choices, this.mode === "list" && this.filters, this.status];
    const body = this.mode === "list" ? h("div", { class: "tr-split" }, this.list, this.detail) : this.detail;
    replace(this.container, problems(this.steps.problems), parts, body);
    if (this.mode === "compare") {
      await compare(this.detail, this.context, this.run);
      return;
    }
    filters(this.filters, this.context, () => this.find());
    await this.find();
  }

  drawChoices() {
    const { context } = this;
    const change = (changes) => {
      const wanted = Object.entries({ ...context.parameters, ...changes, trajectory: null });
      context.open(key, Object.fromEntries(wanted.filter(([, value]) => value !== null)));
    };
    const known = this.known();
    const place = known.indexOf(this.step);
    const choose = (step) => change({ step });
    const runs = context.runs.length > 1 && h("label", {}, "run ", select(context.runs.map((run) => [run.key, run.name]), this.run.key, (value) => change({ run: value, step: null })));
    const kinds = [["train", "training steps"], ["eval", "evaluations"], ["compare", "two checkpoints"]].filter(([kind]) => kind === "train" ? this.steps.train.length : this.steps.eval.length);
    const shown = this.mode === "compare" ? "compare" : this.kind;
    replace(
      this.choices,
      runs,
      h("label", {}, "show ", select(kinds, shown, (value) => change({ mode: value === "compare" ? "compare" : null, kind: value === "eval" ? "eval" : null, step: null }), "tr-kind")),
      this.mode === "list" && [
        h("button", { type: "button", disabled: place <= 0, "aria-label": "Earlier step", onclick: () => choose(known[place - 1]) }, "‹"),
        h("label", {}, this.kind === "eval" ? "after step " : "step ", select(known.map((step) => [String(step), String(this.kind === "eval" ? step : step + 1)]), String(this.step), choose, "tr-step")),
        h("button", { type: "button", disabled: place >= known.length - 1, "aria-label": "Later step", onclick: () => choose(known[place + 1]) }, "›"),
      ],
    );
  }

  async find() {
    const wanted = readFilters(this.context.parameters);
    const asked = { run: this.run.key, kind: this.kind, ...wanted, step: this.context.parameters.everywhere ? null : this.step };
    this.asked = asked;
    let found;
    try {
      found = await this.context.fetchJson("api/trajectories/find", asked);
    } catch (error) {
      this.fail(error);
      return;
    }
    if (this.asked !== asked) return; // another search has begun meanwhile
    const where = this.context.parameters.everywhere ? ` in ${count(found.searched)} steps${found.left ? `; ${count(found.left)} older steps are not searched` : ""}` : "";
    replace(this.status, `${count(found.rows.length)} of ${count(found.of)} trajectories${where}`, found.problems.map((text) => h("span", { class: "problem" }, text)));
    this.filters.dispatchEvent(new CustomEvent("domains", { detail: found.domains }));
    this.drawList(found.rows);
    const open = found.rows.find((row) => String(row.trajectory) === this.context.parameters.trajectory && row.step === this.step);
    await this.open(open ?? found.rows[0]);
  }

  drawList(rows) {
    this.buttons = new Map();
    const items = rows.map((row) => {
      const facts = [
        row.domain,
        `reward ${number(row.reward)}`,
        `${count(row.length)} tokens`,
        row.lag ? `lag ${row.lag}` : null,
        row.truncated ? "truncated" : null,
        row.failure !== null ? "environment failed" : null,
        row.stopped ? `${number(100 * row.stopped, 2)} % stopped` : null,
      ];
      const button = h(
        "button",
        { type: "button", "aria-pressed": "false", onclick: () => this.open(row) },
        h("span", { class: "tr-facts" }, this.context.parameters.everywhere ? `step ${row.kind === "eval" ? row.step : row.step + 1} · ` : "", facts.filter(Boolean).join(" · ")),
        h("span", { class: `tr-mark ${row.correct ? "right" : "wrong"}`, "aria-label": row.correct ? "correct" : "not correct" }, row.correct ? "✓" : "✗"),
        h("span", { class: "tr-text" }, row.prompt.slice(-90)),
        h("span", { class: "tr-text tr-answer" }, row.response),
      );
      this.buttons.set(row, button);
      return h("li", {}, button);
    });
    replace(this.list, items.length ? h("ol", {}, items) : h("p", { class: "empty" }, "No trajectory passes the filters."));
  }

  async open(row) {
    if (!row) {
      replace(this.detail);
      return;
    }
    for (const [other, button] of this.buttons) button.setAttribute("aria-pressed", String(other === row));
    this.context.setParameters({ trajectory: row.trajectory });
    this.opened = row;
    try {
      const asked = { run: this.run.key, kind: row.kind, step: row.step, trajectory: row.trajectory };
      const found = await this.context.fetchJson("api/trajectories/one", asked);
      if (this.opened === row) showTokens(this.detail, this.context, found);
    } catch (error) {
      this.fail(error);
    }
  }

  /** The run has new records: the list of steps grows, what is read stays open. */
  async update() {
    try {
      this.steps = await this.context.fetchJson("api/trajectories/steps", { run: this.run.key });
      if (!this.choices.contains(document.activeElement)) this.drawChoices();
    } catch (error) {
      this.fail(error);
    }
  }

  fail(error) {
    if (!this.context.signal.aborted) replace(this.status, h("span", { class: "problem", role: "alert" }, error.message));
  }
}

/** Return a choice of [value, text] pairs. */
export function select(options, value, onchange, id = null) {
  return h("select", { id, onchange: (event) => onchange(event.target.value) }, options.map(([own, text]) => h("option", { value: own, selected: own === value }, text)));
}

function problems(texts) {
  return texts.map((text) => h("p", { class: "problem" }, text));
}

function styleSheet() {
  if (document.getElementById("tr-style")) return;
  document.head.append(h("link", { id: "tr-style", rel: "stylesheet", href: "views/trajectories.css" }));
}
