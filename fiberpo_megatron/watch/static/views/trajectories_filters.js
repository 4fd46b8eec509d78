// The filters of the list of trajectories; what is chosen is part of the address.

import { h, replace } from "../dom.js";

const TEXTS = ["q", "domain", "truncated", "correct"];
const BOUNDS = ["reward", "length", "lag"];
const PAUSE_MS = 250; // after the last key

/** Return the filters of an address as parameters of a request. */
export function readFilters(parameters) {
  const names = [...TEXTS, ...BOUNDS.flatMap((name) => [`${name}_min`, `${name}_max`])];
  return Object.fromEntries(names.filter((name) => parameters[name]).map((name) => [name, parameters[name]]));
}

/** Fill `parent` with the controls; `search` is called when one has changed. */
export function filters(parent, context, search) {
  let waiting = null;
  const change = (name, value, soon = false) => {
    context.setParameters({ [name]: value || null, trajectory: null });
    clearTimeout(waiting);
    waiting = setTimeout(search, soon ? PAUSE_MS : 0);
  };
  const domain = h("select", { id: "tr-domain", onchange: (event) => change("domain", event.target.value) });
  const fillDomains = (names) => {
    const chosen = context.parameters.domain;
    const all = chosen && !names.includes(chosen) ? [...names, chosen] : names;
    replace(domain, [h("option", { value: "" }, "all"), ...all.map((name) => h("option", { value: name, selected: name === chosen }, name))]);
  };
  fillDomains([]);
  parent.addEventListener("domains", (event) => fillDomains(event.detail));
  replace(
    parent,
    h("input", { type: "search", id: "tr-search", placeholder: "Search in prompts and answers", "aria-label": "Search in prompts and answers", value: context.parameters.q ?? "", oninput: (event) => change("q", event.target.value, true) }),
    h("label", {}, h("input", { type: "checkbox", checked: Boolean(context.parameters.everywhere), onchange: (event) => change("everywhere", event.target.checked ? "1" : null) }), " in all steps"),
    h("label", {}, "domain ", domain),
    BOUNDS.map((name) => bounds(name, context, change)),
    choice("truncated", context, change),
    choice("correct", context, change),
  );
}

function bounds(name, context, change) {
  const input = (end, text) =>
    h("input", { type: "number", step: "any", id: `tr-${name}-${end}`, placeholder: text, "aria-label": `${name} ${text}`, value: context.parameters[`${name}_${end}`] ?? "", oninput: (event) => change(`${name}_${end}`, event.target.value, true) });
  return h("span", { class: "tr-bounds" }, `${name} `, input("min", "from"), input("max", "to"));
}

function choice(name, context, change) {
  const chosen = context.parameters[name] ?? "";
  const options = [["", "all"], ["yes", "yes"], ["no", "no"]];
  return h("label", {}, `${name} `, h("select", { id: `tr-${name}`, onchange: (event) => change(name, event.target.value) }, options.map(([value, text]) => h("option", { value, selected: value === chosen }, text))));
}
