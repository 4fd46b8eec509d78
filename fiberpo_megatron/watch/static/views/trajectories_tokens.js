// One trajectory: its prompt, and its tokens coloured by a quantity, with a card about the token that is pointed at.

import { h, printable, replace } from "../dom.js";
import { count, number } from "../format.js";
import { card } from "./trajectories_card.js";
import { colouring, quantities } from "./trajectories_colours.js";

const BLOCK = 256; // tokens of a block; the browser lays out the blocks that are in sight
let chosenQuantity = "stopped"; // stays when another trajectory is opened

/** Show what the server knows of a trajectory (api/trajectories/one). */
export function showTokens(parent, context, found) {
  const { row, text } = found;
  const record = found.tokens && prepared(found.tokens);
  const facts = [
    row.domain,
    row.id,
    `reward ${number(row.reward)}`,
    row.correct ? "correct" : "not correct",
    `${count(row.length)} tokens`,
    row.lag !== null ? `lag ${row.lag}` : null,
    row.truncated ? "truncated" : null,
    record ? record.objective : null,
  ];
  replace(
    parent,
    found.problems.map((problem) => h("p", { class: "problem" }, problem)),
    h("p", { class: "tr-head" }, facts.filter((fact) => fact !== null && fact !== undefined).join(" · ")),
    row.failure !== null && h("p", { class: "problem" }, `The environment failed: ${row.failure}`),
    h("h3", {}, "Prompt"),
    h("pre", { class: "tr-prompt" }, text.prompt ?? found.tokens?.prompt ?? ""),
    h("h3", {}, "Response"),
    record ? tokenView(record, context) : [h("p", { class: "note" }, "Nothing is recorded of single tokens of this trajectory."), h("pre", { class: "tr-response" }, text.response ?? "")],
    about(text),
  );
}

/** What the environment said of the trajectory beside its reward. */
function about(text) {
  const entries = ["answer", "rewards", "metrics", "metadata", "finish_reason"].filter((name) => text[name] !== undefined && text[name] !== null);
  if (!entries.length) return null;
  return h("details", {}, h("summary", {}, "From the environment"), h("table", {}, h("tbody", {}, entries.map((name) => h("tr", {}, h("th", {}, name.replace("_", " ")), h("td", {}, typeof text[name] === "object" ? JSON.stringify(text[name]) : text[name]))))));
}

/** Add to a record what the colours and the card look up. */
function prepared(record) {
  const size = record.tokens.id.length;
  if (record.experts) {
    const layers = record.experts.layers.length;
    const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const chosen = new DataView(bytes(record.experts.chosen).buffer);
    record.expertsOf = (i, layer) => Array.from({ length: record.experts.top_k }, (_, k) => chosen.getInt16(2 * ((i * layers + layer) * record.experts.top_k + k), true));
    if (record.experts.engine_same) {
      const same = bytes(record.experts.engine_same);
      record.sameAsEngine = (i, layer) => ({ 0: false, 1: true })[same[i * layers + layer]] ?? null;
      record.otherExperts = (i) => {
        const known = record.experts.layers.map((_, layer) => record.sameAsEngine(i, layer)).filter((one) => one !== null);
        return known.length ? known.filter((one) => !one).length / known.length : null;
      };
    }
  }
  record.size = size;
  return record;
}

function tokenView(record, context) {
  const spans = record.tokens.text.map((piece, i) => tokenSpan(record, piece, i));
  const blocks = [];
  for (let begin = 0; begin < spans.length; begin = blocks.at(-1).end) {
    const end = blockEnd(record, begin);
    const branch = branchesOf(record).indexOf(begin) + 1;
    const title = branch > 0 && h("div", { class: "tr-branch" }, `Branch ${branch}, from its prompt on`);
    blocks.push({ end, element: h("div", { class: "tr-block" }, title, spans.slice(begin, end)) });
  }
  const legend = h("div", {});
  const shown = h("aside", { class: "tr-card", "aria-live": "polite", id: "tr-card" });
  const all = quantities(record);
  const paint = (name) => {
    const quantity = all.find((one) => one.key === name) ?? all[0];
    chosenQuantity = quantity.key;
    const colours = colouring(quantity, record.size);
    spans.forEach((span, i) => {
      span.className = `tk ${colours.classOf(i)}${record.tokens.sampled[i] ? "" : " tk-said"}`;
    });
    spans[current].classList.add("tk-here");
    replace(legend, colours.legend);
  };
  let current = 0;
  const point = (i, scroll = false) => {
    if (i < 0 || i >= record.size) return;
    spans[current].classList.remove("tk-here");
    current = i;
    spans[i].classList.add("tk-here");
    if (scroll) spans[i].scrollIntoView({ block: "nearest" });
    replace(shown, card(record, i));
  };
  const text = h(
    "div",
    {
      class: "tr-tokens",
      id: "tr-tokens",
      tabindex: "0",
      role: "group",
      "aria-label": "Tokens; the arrow keys move from one to the next",
      "aria-describedby": "tr-card",
      onmouseover: (event) => event.target.dataset.i !== undefined && point(Number(event.target.dataset.i)),
      onclick: (event) => event.target.dataset.i !== undefined && point(Number(event.target.dataset.i)),
      onkeydown: (event) => {
        const target = { ArrowRight: current + 1, ArrowLeft: current - 1, PageDown: Math.min(current + 50, record.size - 1), PageUp: Math.max(current - 50, 0), Home: 0, End: record.size - 1 }[event.key];
        if (target === undefined) return;
        event.preventDefault();
        point(target, true);
      },
    },
    blocks.map((block) => block.element),
  );
  const colour = h("select", { id: "tr-colour", onchange: (event) => paint(event.target.value) }, all.map((one) => h("option", { value: one.key, selected: one.key === chosenQuantity }, one.title)));
  paint(chosenQuantity);
  point(0);
  context.onLeave(() => replace(shown));
  return [h("div", { class: "controls" }, h("label", {}, "colour ", colour), legend), h("div", { class: "tr-read" }, text, shown)];
}

function tokenSpan(record, piece, i) {
  const span = document.createElement("span");
  span.dataset.i = i;
  span.textContent = piece === "" ? "\u00b7" : printable(piece).replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
  return span;
}

/** Return where further token sequences of the trajectory begin. */
function branchesOf(record) {
  return Array.isArray(record.branches) ? record.branches : [];
}

/** Blocks end behind a line where one ends soon, because each begins a new line; and before a branch. */
function blockEnd(record, begin) {
  const next = branchesOf(record).find((place) => place > begin) ?? record.size;
  const most = Math.min(begin + 2 * BLOCK, next, record.size);
  for (let i = begin + BLOCK; i < most; i += 1) if (record.tokens.text[i - 1].includes("\n")) return i;
  return most;
}
