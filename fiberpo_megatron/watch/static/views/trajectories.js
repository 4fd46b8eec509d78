// Trajectories and the tokens in them.

import { h } from "../dom.js";

export const key = "trajectories";
export const title = "Trajectories";

export function render(container) {
  container.append(h("p", { class: "empty" }, "No trajectories are recorded in this run."));
}
