// Alarms: what is raised now, with causes and a setting to try, and what has been.

import { h, replace } from "../dom.js";
import { count, number } from "../format.js";

export const key = "alarms";
export const title = "Alarms";

export async function render(container, context) {
  const show = async () => replace(container, await Promise.all(context.runs.map((run) => ofRun(context, run))));
  context.onUpdate(show);
  await show();
}

async function ofRun(context, run) {
  const events = await context.fetchJson("api/alarms", { run: run.key });
  const latest = new Map();
  for (const event of events) latest.set(event.rule, event);
  const raised = [...latest.values()].filter((event) => event.state === "raised").reverse();
  const name = context.runs.length > 1 ? ` · ${run.name}` : "";
  return h(
    "section",
    {},
    h("h2", {}, `Raised now${name}`),
    raised.length ? raised.map((event) => card(context, event)) : h("p", { class: "empty good" }, "No alarm is raised."),
    events.length > 0 && [h("h2", {}, `All events${name}`), history(events)],
  );
}

function card(context, event) {
  return h(
    "article",
    { class: `alarm ${event.severity}` },
    h("h3", {}, h("span", { class: `tag ${event.severity}` }, event.severity), event.rule.replaceAll("_", " "), h("small", {}, `since step ${count(event.since + 1)}`)),
    h("p", {}, event.message),
    event.causes.length > 0 && [h("h4", {}, "Likely causes"), h("ul", {}, event.causes.map((cause) => h("li", {}, cause)))],
    event.setting && h("p", {}, h("b", {}, "Try "), h("code", {}, event.setting)),
    h("button", { type: "button", onclick: () => context.open("curves", { filter: event.metric }) }, `Show ${event.metric}`),
  );
}

function history(events) {
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("th", { class: "number" }, "step"), h("th", {}, "event"), h("th", {}, "rule"), h("th", { class: "number" }, "value"), h("th", { class: "number" }, "limit"), h("th", {}, "what"))),
      h(
        "tbody",
        {},
        [...events].reverse().map((event) =>
          h(
            "tr",
            {},
            h("td", { class: "number" }, count(event.done)),
            h("td", {}, h("span", { class: `tag ${event.state === "raised" ? event.severity : "cleared"}` }, event.state)),
            h("td", {}, event.rule.replaceAll("_", " ")),
            h("td", { class: "number" }, number(event.value)),
            h("td", { class: "number" }, number(event.limit)),
            h("td", {}, event.message),
          ),
        ),
      ),
    ),
  );
}
