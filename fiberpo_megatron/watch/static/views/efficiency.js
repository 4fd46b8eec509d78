// How fast the run is, and how well it uses its machines.

import { h, replace } from "../dom.js";
import { withUnit } from "../format.js";
import { panelPage } from "../panel_page.js";

export const key = "efficiency";
export const title = "Efficiency";

const SECTIONS = ["efficiency", "slowest-ranks", "speed", "memory-and-disk", "gpus"];

export async function render(container, context) {
  const tables = h("div", { class: "efficiency-now" });
  const show = async () => {
    const found = await Promise.all(context.runs.map(async (run) => [run, await step(context, run)]));
    replace(tables, found.map(([run, record]) => record && now(run, record, context.runs.length > 1)));
  };
  context.onUpdate(show);
  await Promise.all([
    show(),
    panelPage(
      container,
      context,
      (sections) => SECTIONS.flatMap((wanted) => sections.filter((section) => section.key === wanted)),
      { intro: tables },
    ),
  ]);
}

async function step(context, run) {
  try {
    return await context.fetchJson("api/step", { run: run.key });
  } catch (error) {
    if (error.name === "NotThere") return null;
    throw error;
  }
}

/** Return the figures of the last step: by phase, and over the run. */
function now(run, record, named) {
  const { values, units } = record;
  const rows = new Map();
  for (const name of Object.keys(values)) {
    const found = /^(mfu|tflops_per_gpu|tokens_per_second_per_gpu|slowest)\/([^/]+)(?:\/(rank|excess_seconds))?$/.exec(name);
    if (!found) continue;
    const row = rows.get(found[2]) ?? {};
    row[found[3] ?? found[1]] = withUnit(values[name], found[3] === "rank" ? "" : units[name]);
    rows.set(found[2], row);
  }
  const overall = [
    ["goodput", "goodput"],
    ["restart/lost_seconds", "lost to restarts"],
    ["memory/peak_gib", "peak of GPU memory"],
    ["memory/host_peak_gib", "peak of host memory"],
    ["energy/joules_per_token", "energy"],
    ["tokens_per_second", "throughput"],
    ["gate/time_share", "time in the gate"],
  ].filter(([name]) => name in values);
  const columns = [
    ["mfu", "MFU"],
    ["tflops_per_gpu", "per GPU"],
    ["tokens_per_second_per_gpu", "tokens per GPU"],
    ["rank", "slowest rank"],
    ["excess_seconds", "above the median"],
  ].filter(([column]) => [...rows.values()].some((row) => column in row));
  return h(
    "section",
    {},
    h("h2", {}, named ? `Step ${record.step} · ${run.name}` : `Step ${record.step}`),
    h("dl", { class: "figures" }, overall.map(([name, label]) => h("div", {}, h("dd", {}, withUnit(values[name], units[name])), h("dt", {}, label)))),
    rows.size > 0 &&
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, h("th", {}, "phase"), columns.map(([, label]) => h("th", { class: "number" }, label)))),
          h("tbody", {}, [...rows].map(([phase, row]) => h("tr", {}, h("th", { scope: "row" }, phase.replaceAll("_", " ")), columns.map(([column]) => h("td", { class: "number" }, row[column] ?? "–"))))),
        ),
      ),
  );
}
