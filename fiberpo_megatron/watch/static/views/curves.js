// All curves of the runs.

import { h } from "../dom.js";
import { panelPage } from "../panel_page.js";

export const key = "curves";
export const title = "Curves";

export async function render(container, context) {
  const jump = h("nav", { class: "jump", "aria-label": "Sections" });
  await panelPage(
    container,
    context,
    (sections) => {
      const links = sections.map((section) =>
        h("button", { type: "button", onclick: () => document.getElementById(`section-${section.key}`)?.scrollIntoView({ block: "start" }) }, section.title),
      );
      jump.replaceChildren(...links);
      return sections;
    },
    { filter: true, intro: jump, empty: "No metrics yet: the run has not finished a step." },
  );
}
