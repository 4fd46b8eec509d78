// The domains of a run side by side.

import { panelPage } from "../panel_page.js";

export const key = "domains";
export const title = "Domains";

export async function render(container, context) {
  await panelPage(container, context, pick, {
    empty: "The run has no metrics of domains yet. With several [[environments]] each of them is a domain.",
  });
}

/** Return the charts of domains; of a run with one domain alone that one. */
function pick(sections) {
  const own = sections.filter((section) => section.key === "domains" || section.key === "gate-of-level-domain");
  const environments = sections.filter((section) => section.key === "environments");
  if (own.length) return [...own, ...environments];
  const panels = sections.flatMap((section) => section.panels);
  const accuracy = panels.filter((panel) => panel.curves.some((curve) => /^accuracy(\/|$)/.test(curve.metric)));
  const rewards = panels.filter((panel) => panel.curves.some((curve) => /^reward\//.test(curve.metric)));
  const found = [...new Set([...accuracy, ...rewards])];
  return found.length ? [{ key: "one", title: "One domain", panels: found }, ...environments] : [];
}
