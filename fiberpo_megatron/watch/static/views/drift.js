// Why the policy that is trained differs from the one that sampled: by cause.

import { h, replace } from "../dom.js";
import { count, number } from "../format.js";
import { panelPage } from "../panel_page.js";
import { readable } from "../plot.js";

export const key = "drift";
export const title = "Drift";

const CAUSES = [
  ["drift/staleness", "Staleness", "the engine sampled with older weights"],
  ["drift/mismatch", "Mismatch", "engine and trainer compute the same weights differently"],
  ["drift/optimiser_steps", "Optimiser steps", "the policy moves while it learns from a batch"],
];
const METRICS = /^(drift\/|rollout_diff|ratio\/|effective_sample_size|token\/clip_share|expert\/drift|off_policy_mask|routing)/;

export async function render(container, context) {
  const intro = h("div", {});
  const show = async () => {
    const records = await Promise.all(context.runs.map((run) => lastStep(context, run)));
    replace(intro, causes(context.runs, records));
  };
  context.onUpdate(show);
  await Promise.all([show(), panelPage(container, context, pick, { intro })]);
}

function pick(sections) {
  const panels = sections.flatMap((section) => section.panels).filter((panel) => panel.curves.some((curve) => METRICS.test(curve.metric)));
  const order = (panel) => (panel.curves[0].metric.startsWith("drift/") ? 0 : 1);
  panels.sort((a, b) => order(a) - order(b));
  return panels.length ? [{ key: "drift", title: "Drift", panels }] : [];
}

async function lastStep(context, run) {
  try {
    return await context.fetchJson("api/step", { run: run.key });
  } catch (error) {
    if (error.name === "NotThere") return null;
    throw error;
  }
}

/** Return a run's drift by the cause `name`: {value, note}. Where means by cause are not logged it is that of the token
 * with the largest one, which `rollout_diff/max` and `ratio/max` have. */
function drift(name, meaning, { values }, mean) {
  const found = {
    "drift/staleness": values[name] ?? 0,
    "drift/mismatch": mean ? values[name] : values["rollout_diff/max"],
    "drift/optimiser_steps": mean ? values[name] : values["ratio/max"] > 0 ? Math.max(0, Math.log(values["ratio/max"])) : undefined,
  }[name];
  const none = name === "drift/staleness" && !values[name];
  return { value: found, note: none ? "none: each step's trajectories are sampled with the weights that it trains" : meaning };
}

/** Return the last step's drift by cause, in nats a token, as bars of one scale. */
function causes(runs, records) {
  const known = runs.map((run, place) => [run, records[place]]).filter(([, record]) => record !== null);
  if (!known.length) return null;
  const mean = known.every(([, record]) => "drift/optimiser_steps" in record.values);
  const rows = CAUSES.map(([name, label, meaning]) => ({ label, drifts: known.map(([, record]) => drift(name, meaning, record, mean)) }));
  const largest = Math.max(1e-12, ...rows.flatMap((row) => row.drifts.map(({ value }) => value ?? 0)));
  const cells = ({ value }, run) => [
    h("td", { class: "number" }, value === undefined ? "not logged" : number(value)),
    h("td", { class: "length" }, h("span", { class: "bar", style: { width: `${(100 * (value ?? 0)) / largest}%`, background: runs.length > 1 ? readable(run.colour) : null } })),
  ];
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { class: "bars" },
      h("caption", { class: "note" }, `Difference of a token's log-probs between the policy that is trained and the one that sampled, by cause, in nats: ${mean ? "mean over the tokens" : "of the token with the largest one"}`),
      h("thead", {}, h("tr", {}, h("th", {}, "cause"), known.map(([run, record]) => h("th", { colspan: 2 }, runs.length > 1 && `${run.name}, `, `step ${count(record.step)}`)))),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h("tr", {}, h("th", { scope: "row" }, row.label, h("small", {}, row.drifts[0].note)), row.drifts.map((one, place) => cells(one, known[place][0]))),
        ),
      ),
    ),
  );
}
