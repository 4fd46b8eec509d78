// Why the policy that is trained differs from the one that sampled: by cause.

import { h, replace } from "../dom.js";
import { number } from "../format.js";
import { panelPage } from "../panel_page.js";

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
  const show = async () => replace(intro, await Promise.all(context.runs.map((run) => causes(context, run))));
  context.onUpdate(show);
  await Promise.all([
    show(),
    panelPage(
      container,
      context,
      (sections) => {
        const panels = sections.flatMap((section) => section.panels).filter((panel) => panel.curves.some((curve) => METRICS.test(curve.metric)));
        const order = (panel) => (panel.curves[0].metric.startsWith("drift/") ? 0 : 1);
        panels.sort((a, b) => order(a) - order(b));
        return panels.length ? [{ key: "drift", title: "Drift", panels }] : [];
      },
      { intro },
    ),
  ]);
}

/** Return the last step's drift by cause, in nats a token, as bars of one scale. */
async function causes(context, run) {
  let record;
  try {
    record = await context.fetchJson("api/step", { run: run.key });
  } catch (error) {
    if (error.name === "NotThere") return null;
    throw error;
  }
  const { values } = record;
  const mismatch = values["drift/mismatch"] ?? values["rollout_diff/mean"];
  const rows = CAUSES.map(([name, label, meaning]) => {
    let value = values[name];
    let note = meaning;
    if (name === "drift/mismatch") value = mismatch;
    if (name === "drift/staleness" && value === undefined) {
      value = 0;
      note = "none: this run generates with the newest weights, in step with its training";
    }
    return { label, value, note };
  });
  const largest = Math.max(...rows.map((row) => row.value ?? 0), 1e-12);
  return h(
    "section",
    {},
    h("h2", {}, context.runs.length > 1 ? `Step ${record.step} · ${run.name}` : `Step ${record.step}`),
    h(
      "table",
      { class: "bars" },
      h("thead", {}, h("tr", {}, h("th", {}, "cause"), h("th", { class: "number" }, "nats a token"), h("th", {}, "mean |difference of log-probs|"))),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, row.label, h("small", {}, row.note)),
            h("td", { class: "number" }, row.value === undefined ? "not logged" : number(row.value)),
            h("td", {}, h("span", { class: "bar", style: { width: `${(100 * (row.value ?? 0)) / largest}%` } })),
          ),
        ),
      ),
    ),
  );
}
