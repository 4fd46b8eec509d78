// The card of one token: why it learned or not, its figures, the gates of its levels, and its experts.

import { h } from "../dom.js";
import { number } from "../format.js";
import { last, nodesOf, reasons, verdict } from "./trajectories_reasons.js";

/** Return the elements of the card of token `i`. */
export function card(record, i) {
  const found = reasons(record, i);
  return [
    h("h4", {}, h("code", {}, JSON.stringify(record.tokens.text[i])), h("small", {}, `token ${i + 1} of ${record.size}, id ${record.tokens.id[i]}`)),
    h("p", { class: "tr-verdict" }, verdict(record, i)),
    found.length ? h("ul", { class: "tr-reasons" }, found.map((one) => h("li", { class: one.kind }, one.text))) : h("p", { class: "tr-reasons" }, "No gate and no clip stopped it."),
    figures(record, i),
    levels(record, i),
    experts(record, i),
  ];
}

function figures(record, i) {
  const tokens = record.tokens;
  const steps = (rows) => rows?.map((row) => number(row[i], 4)).join(", ");
  const ratio = last(tokens.log_ratio, i);
  const version = tokens.weight_version[i];
  const rows = [
    ["probability", value(tokens.log_prob?.[i], (x) => number(Math.exp(x), 4))],
    ["probability, engine", tokens.sampled[i] ? value(tokens.rollout_log_prob[i], (x) => number(Math.exp(x), 4)) : null],
    ["entropy", value(tokens.entropy?.[i], (x) => `${number(x, 4)} nats`)],
    ["ratio", ratio === null ? null : number(Math.exp(ratio), 5)],
    ["log ratio by optimiser step", ratio === null ? null : steps(tokens.log_ratio)],
    ["advantage", value(tokens.advantage?.[i], (x) => number(x, 4))],
    ["weight", value(tokens.weight?.[i], (x) => number(x, 4))],
    ["importance weight", value(tokens.importance_weight?.[i], (x) => number(x, 4))],
    ["c by optimiser step", ratio === null ? null : steps(tokens.coefficient)],
    ["gated ratio", value(tokens.gated_ratio?.[i], (x) => number(x, 5))],
    [clipName(record, i), clipRange(record, i)],
    ["sampled by", version >= 0 ? `engine ${tokens.engine[i]} with weights ${version}, ${record.step - version} behind` : null],
  ];
  return h("table", { class: "tr-figures" }, h("tbody", {}, rows.filter(([, text]) => text !== null && text !== undefined).map(([name, text]) => h("tr", {}, h("th", {}, name), h("td", {}, text)))));
}

function value(figure, shown) {
  return figure === null || figure === undefined ? null : shown(figure);
}

function clipName(record, i) {
  return record.clip_figures[record.tokens.clip_figure?.[i]] ?? "clip";
}

function clipRange(record, i) {
  const tokens = record.tokens;
  if (tokens.clip_value?.[i] === null || tokens.clip_value === undefined) return null;
  const end = (bound) => (bound === null ? "no bound" : number(bound));
  const own = tokens.clip_value[i];
  return `${number(own, 4)}, passes from ${end(tokens.clip_low[i])} to ${end(tokens.clip_high[i])}`;
}

function levels(record, i) {
  if (!record.levels.length) return null;
  const rows = record.levels.flatMap((level) =>
    nodesOf(level, i).flatMap(([node, share]) =>
      [0, 1].map((own) =>
        h(
          "tr",
          { class: node.state[own] },
          own === 0 && h("th", { rowspan: 2 }, level.name, h("small", {}, Object.entries(node.id).map(([name, id]) => `${name} ${id}`).join(", "), share < 1 ? `, share ${number(share)}` : "")),
          h("td", {}, own ? "S−" : "S+"),
          h("td", { class: "number" }, number(node.S[own])),
          h("td", { class: "number" }, number(node.D[own])),
          h("td", { class: "number" }, number(node.C[own])),
          h("td", {}, { pass: "passes", rollback: "rolled back", zeroed: "zeroed" }[node.state[own]]),
        ),
      ),
    ),
  );
  const head = ["level", "", "S", "residual", "budget", "gate"].map((name) => h("th", {}, name));
  return h("div", { class: "scroll" }, h("table", { class: "tr-levels" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows)));
}

function experts(record, i) {
  if (!record.experts) return null;
  const rows = record.experts.layers.map((layer, place) => {
    const same = record.sameAsEngine?.(i, place) ?? null;
    const said = { true: "the same in the engine", false: "others in the engine" }[same] ?? "";
    const chosen = record.expertsOf(i, place);
    return h("tr", { class: same === false ? "other" : "" }, h("th", {}, `layer ${layer}`), h("td", {}, chosen[0] < 0 ? "not recorded" : chosen.join(", ")), h("td", {}, said));
  });
  return h("details", { open: rows.length <= 8 }, h("summary", {}, "Experts"), h("table", {}, h("tbody", {}, rows)));
}
