// The answers of two evaluations to the same prompts, side by side: of two checkpoints, or of two runs.

import { h, replace } from "../dom.js";
import { count, number } from "../format.js";

/** Fill `parent`; the sides are part of the address as left and right, each RUN:STEP. */
export async function compare(parent, context, run) {
  const sides = [];
  for (const one of context.runs) {
    const steps = await context.fetchJson("api/trajectories/steps", { run: one.key });
    for (const step of steps.eval) sides.push({ key: `${one.key}:${step}`, run: one.key, step, title: context.runs.length > 1 ? `${one.name}, after step ${step}` : `after step ${step}` });
  }
  if (sides.length < 2) {
    replace(parent, h("p", { class: "empty" }, "Two evaluations are needed; evaluation.every_steps says how often a run has one."));
    return;
  }
  const of = (name, other) => sides.find((side) => side.key === context.parameters[name]) ?? other;
  let left = of("left", sides.find((side) => side.run === run.key) ?? sides[0]);
  let right = of("right", sides.filter((side) => side.run === run.key).at(-1) ?? sides.at(-1));
  let different = false;
  const found = h("div", { class: "tr-pairs" });
  const status = h("p", { class: "note", role: "status" });
  let pairs = [];
  const draw = () => {
    const shown = pairs.filter((pair) => !different || pair.left.response !== pair.right.response);
    const better = pairs.filter((pair) => pair.right.reward > pair.left.reward).length;
    const worse = pairs.filter((pair) => pair.right.reward < pair.left.reward).length;
    replace(status, `${count(shown.length)} of ${count(pairs.length)} prompts; the right answer has a higher reward for ${better} and a lower one for ${worse}`);
    replace(found, shown.map((pair) => pairElement(pair, left, right)));
  };
  const load = async () => {
    context.setParameters({ left: left.key, right: right.key });
    try {
      const answer = await context.fetchJson("api/trajectories/compare", { left_run: left.run, left_step: left.step, right_run: right.run, right_step: right.step });
      pairs = answer.pairs;
      draw();
      if (answer.problems.length) status.append(h("span", { class: "problem" }, answer.problems.join("; ")));
    } catch (error) {
      if (!context.signal.aborted) replace(status, h("span", { class: "problem", role: "alert" }, error.message));
    }
  };
  const choice = (id, chosen, change) =>
    h("select", { id, onchange: (event) => change(sides.find((side) => side.key === event.target.value)) }, sides.map((side) => h("option", { value: side.key, selected: side === chosen }, side.title)));
  replace(
    parent,
    h(
      "div",
      { class: "controls" },
      h("label", {}, "left ", choice("tr-left", left, (side) => ((left = side), load()))),
      h("label", {}, "right ", choice("tr-right", right, (side) => ((right = side), load()))),
      h("label", {}, h("input", { type: "checkbox", id: "tr-different", onchange: (event) => ((different = event.target.checked), draw()) }), " only different answers"),
    ),
    status,
    found,
  );
  await load();
}

function pairElement(pair, left, right) {
  const answer = (one, side) =>
    h("div", { class: `tr-answer-of ${one.correct ? "right" : "wrong"}` }, h("small", {}, `${side.title} · reward ${number(one.reward)} · ${count(one.length)} tokens${one.truncated ? " · truncated" : ""}`), h("pre", {}, one.response));
  const facts = [pair.domain, pair.answer !== null && pair.answer !== undefined ? `wanted: ${typeof pair.answer === "object" ? JSON.stringify(pair.answer) : pair.answer}` : null];
  return h("article", { class: "tr-pair" }, h("small", {}, facts.filter(Boolean).join(" · ")), h("pre", { class: "tr-prompt" }, pair.prompt), answer(pair.left, left), answer(pair.right, right));
}
