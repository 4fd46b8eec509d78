// What the gates of each level do: regimes, channels, and the drift that they look at.

import { h } from "../dom.js";
import { panelPage } from "../panel_page.js";

export const key = "gates";
export const title = "Gates";

export async function render(container, context) {
  const intro = h(
    "p",
    { class: "note intro" },
    "A gate bounds how far a node (a trajectory, a prompt group, a domain) has drifted from the policy that sampled it. S⁺ is the mean drift of its tokens that became more probable, S⁻ of those that became less probable. Within the budget a channel passes; a little beyond it the drift is turned back (rollback), further beyond it is zeroed.",
  );
  await panelPage(
    container,
    context,
    (sections) => {
      const levels = sections.filter((section) => section.key.startsWith("gate-of-level"));
      const clips = sections.flatMap((section) => section.panels).filter((panel) => panel.curves.some((curve) => /^token\/(clip|traj)/.test(curve.metric)));
      return clips.length ? [...levels, { key: "tokens", title: "Clips of tokens", panels: clips }] : levels;
    },
    { intro, empty: "This run's objective has no gates above the tokens, or no step has ended yet." },
  );
}
