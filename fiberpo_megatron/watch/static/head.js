// The head of the page: the runs with their states, and the switch of the theme.

import { h, replace } from "./dom.js";
import { readable } from "./plot.js";
import { storedTheme, nextTheme, setTheme } from "./theme.js";

/** Draw the head. `actions` has choose(keys) for the runs to show, and rerender() for what depends on the theme. */
export function head(element, page, actions) {
  const focused = document.activeElement?.id;
  const shown = new Set(page.chosen ?? page.runs.map((run) => run.key));
  replace(
    element,
    h("h1", {}, h("a", { href: "#overview" }, "fiberpo watch")),
    h("ul", { class: "runs", "aria-label": "Runs" }, page.runs.map((run) => runItem(run, shown, page, actions))),
    !page.reachable &&
      h("p", { class: "problem unreachable", role: "alert" }, "The server does not answer; trying again."),
    themeButton(actions),
  );
  if (focused) document.getElementById(focused)?.focus();
}

function runItem(run, shown, page, actions) {
  const toggle = () => {
    const keys = page.runs.map((one) => one.key).filter((key) => (key === run.key) !== shown.has(key));
    if (keys.length) actions.choose(keys);
  };
  const state = h("span", { class: `state ${run.state.name}`, title: run.state.detail }, run.state.name);
  const swatch = h("span", { class: "swatch", style: { background: readable(run.colour) } });
  const name = h("span", { class: "name" }, run.name);
  const reading = run.read < 1 && h("span", { class: "reading" }, `reading, ${Math.round(100 * run.read)} %`);
  if (page.runs.length === 1) return h("li", {}, name, state, reading);
  return h(
    "li",
    {},
    h(
      "button",
      { id: `run-${run.key}`, type: "button", "aria-pressed": shown.has(run.key) ? "true" : "false", onclick: toggle },
      swatch,
      name,
      state,
      reading,
    ),
  );
}

function themeButton(actions) {
  const theme = storedTheme();
  const label = { light: "light", dark: "dark" }[theme] ?? "as the system";
  return h(
    "button",
    {
      id: "theme",
      type: "button",
      class: "theme",
      "aria-label": `Theme: ${label}. Change it`,
      title: `Theme: ${label}`,
      onclick: () => {
        setTheme(nextTheme(theme));
        actions.rerender();
      },
    },
    { light: "☀", dark: "☾" }[theme] ?? "◐",
  );
}
