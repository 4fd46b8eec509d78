// What the tokens are coloured by, and the legends.

import { h } from "../dom.js";
import { number } from "../format.js";
import { last, reasons } from "./trajectories_reasons.js";

export const STEPS = 7; // shades of a scale, on each side of the middle of a diverging one

/** Return the quantities that a record has: [{key, title, value(i), form}]; form is "scale", "diverging" or "named". */
export function quantities(record) {
  const tokens = record.tokens;
  const all = [
    { key: "stopped", title: "what stopped it", form: "named", value: (i) => stopName(record, i) },
    { key: "coefficient", title: "coefficient c", form: "diverging", value: (i) => last(tokens.coefficient, i), has: tokens.coefficient?.length },
    { key: "ratio", title: "log ratio", form: "diverging", value: (i) => last(tokens.log_ratio, i), has: tokens.log_ratio?.length },
    { key: "advantage", title: "advantage", form: "diverging", value: (i) => tokens.advantage[i], has: tokens.advantage },
    { key: "probability", title: "probability", form: "scale", top: 1, value: (i) => exp(tokens.log_prob[i]), has: tokens.log_prob },
    { key: "entropy", title: "entropy", form: "scale", value: (i) => tokens.entropy[i], has: tokens.entropy },
    { key: "weight", title: "weight", form: "scale", value: (i) => tokens.weight[i], has: tokens.weight },
    { key: "importance_weight", title: "importance weight", form: "scale", value: (i) => tokens.importance_weight[i], has: tokens.importance_weight },
    { key: "mismatch", title: "engine − trainer log-prob", form: "diverging", value: (i) => minus(tokens.rollout_log_prob[i], tokens.log_prob[i]), has: tokens.log_prob },
    { key: "routing", title: "routing unlike the engine", form: "scale", value: (i) => record.otherExperts?.(i) ?? null, has: record.experts?.engine_same },
    { key: "version", title: "weight version", form: "named", value: (i) => (tokens.weight_version[i] >= 0 ? `version ${tokens.weight_version[i]}` : "none") },
  ];
  return all.filter((one) => !("has" in one) || one.has);
}

function exp(value) {
  return value === null || value === undefined ? null : Math.exp(value);
}

function minus(a, b) {
  return a === null || a === undefined || b === null || b === undefined ? null : a - b;
}

function stopName(record, i) {
  const [first] = reasons(record, i);
  if (!first) return "nothing";
  return first.level ? `${first.level} ${first.kind}` : { advantage: "advantage 0", masked: "mask", environment: "environment", unknown: "not recorded" }[first.kind] ?? first.kind;
}

/** Return {classOf(i), legend}: the class of each token's colour, and an element that explains it. */
export function colouring(quantity, size) {
  const values = Array.from({ length: size }, (_, i) => quantity.value(i));
  return quantity.form === "named" ? named(values) : scaled(values, quantity);
}

function named(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const plain = ["nothing", "environment", "none", "not recorded"];
  const shown = [...counts.keys()].filter((name) => !plain.includes(name)).sort();
  const place = new Map(shown.map((name, at) => [name, `tk-k${at % 8}`]));
  for (const name of plain) place.set(name, name === "nothing" ? "" : "tk-env");
  const items = [...counts].sort((a, b) => b[1] - a[1]).map(([name, many]) => h("li", {}, h("span", { class: `tk ${place.get(name)}` }, "ab"), ` ${name} (${many})`));
  return { classOf: (i) => place.get(values[i]), legend: h("ul", { class: "tr-legend" }, items) };
}

function scaled(values, quantity) {
  const diverging = quantity.form === "diverging";
  const known = values.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  const top = quantity.top ?? (known[Math.min(known.length - 1, Math.floor(known.length * 0.98))] || known[known.length - 1] || 1);
  const classOf = (i) => {
    const value = values[i];
    if (value === null || value === undefined) return "tk-env";
    const shade = Math.min(STEPS, Math.round((STEPS * Math.abs(value)) / (top || 1)));
    if (shade === 0) return "";
    return diverging && value < 0 ? `tk-n${shade}` : `tk-p${shade}`;
  };
  const shades = Array.from({ length: STEPS + 1 }, (_, shade) => shade);
  const cell = (name) => h("span", { class: `tk ${name}` }, " ");
  const bar = [
    diverging && [number(-top), shades.slice(1).reverse().map((shade) => cell(`tk-n${shade}`))],
    cell(""),
    shades.slice(1).map((shade) => cell(`tk-p${shade}`)),
    number(top),
  ];
  return { classOf, legend: h("p", { class: "tr-legend" }, diverging ? "" : "0 ", bar) };
}
