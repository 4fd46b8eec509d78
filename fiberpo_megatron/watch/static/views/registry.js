// The views of the page, in the order of their tabs. Each is a module of this folder that exports
//
//   key      a short word for the address (#curves), and title, the text of its tab;
//   render(container, context)   fills `container` and returns nothing, or a promise of nothing.
//
// `context` is what app.js gives to a view; see the comment at `makeContext` there.
export const modules = [
  "overview",
  "curves",
  "step",
  "gates",
  "drift",
  "domains",
  "trajectories",
  "engines",
  "efficiency",
  "alarms",
];
