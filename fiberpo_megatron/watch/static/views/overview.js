// What a run is and where it stands.

import { h, replace } from "../dom.js";

export const key = "overview";
export const title = "Overview";

export function render(container, context) {
  const draw = (runs) =>
    replace(container, runs.map((run) => h("section", {}, h("h2", {}, run.name), h("p", {}, run.state.detail))));
  draw(context.runs);
  context.onUpdate(draw);
}
