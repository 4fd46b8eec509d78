// The frame of the page: which runs and which view are shown, what is new, and the theme.
//
// The state that a person can share is in the address: #VIEW?run=0&run=1&... The server is asked every two seconds whether
// a run has changed; the view that is open is then told.

import { fetchJson } from "./data.js";
import { h, replace } from "./dom.js";
import { head } from "./head.js";
import { applyTheme } from "./theme.js";
import { modules } from "./views/registry.js";

const PAUSE_MS = 2000;
export const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c6bb1", "#8c564b"];

const page = {
  views: [],
  runs: [],
  chosen: null, // keys of the runs that are shown; null stands for all
  view: null,
  parameters: {},
  range: null, // [from, to] in steps done, shared by all charts; null shows everything
  leave: null, // ends what the open view has begun
  listeners: new Set(),
  reachable: true,
};

/** Return what a view gets:
 *
 * runs         the runs that are shown: [{key, name, colour, version, kinds, state, ...}], as api/runs says
 * allRuns      all runs of the server
 * parameters   what follows the view's key in the address, as an object of texts
 * setParameters(changes)   changes them without rendering the view again; null removes one
 * open(key, parameters)    opens another view
 * fetchJson(path, parameters)   asks the server; requests end when the view is left
 * onUpdate(listener)   calls `listener(runs)` whenever one of the shown runs has new records
 * onLeave(listener)    calls `listener()` when the view is left
 * signal       an AbortSignal that is aborted when the view is left
 * range        {get(), set([from, to] or null), subscribe(listener)}: the shared range of steps
 * announce(text)   says something to screen readers
 */
function makeContext() {
  const control = new AbortController();
  const leaving = [];
  const rangeListeners = new Set();
  page.leave = () => {
    control.abort();
    leaving.forEach((listener) => listener());
    page.listeners.clear();
  };
  return {
    runs: shownRuns(),
    allRuns: page.runs,
    parameters: page.parameters,
    setParameters: (changes) => {
      page.parameters = Object.fromEntries(
        Object.entries({ ...page.parameters, ...changes }).filter(([, value]) => value !== null && value !== undefined),
      );
      history.replaceState(null, "", address(page.view.key, page.parameters));
    },
    open: (key, parameters = {}) => {
      location.hash = address(key, parameters);
    },
    fetchJson: (path, parameters) => fetchJson(path, parameters, control.signal),
    onUpdate: (listener) => page.listeners.add(listener),
    onLeave: (listener) => leaving.push(listener),
    signal: control.signal,
    range: {
      get: () => page.range,
      set: (range) => {
        page.range = range;
        rangeListeners.forEach((listener) => listener(range));
      },
      subscribe: (listener) => rangeListeners.add(listener),
    },
    announce: (text) => replace(document.getElementById("announcement"), text),
  };
}

function shownRuns() {
  return page.runs.filter((run) => page.chosen === null || page.chosen.includes(run.key));
}

function address(key, parameters) {
  const query = new URLSearchParams(parameters);
  if (page.chosen !== null) page.chosen.forEach((run) => query.append("show", run));
  return `#${key}${query.size ? `?${query}` : ""}`;
}

/** Read view, runs and parameters from the address, and render. */
function follow() {
  const [key, query = ""] = location.hash.replace(/^#/, "").split("?", 2);
  const parameters = new URLSearchParams(query);
  const shown = parameters.getAll("show").filter((run) => page.runs.some((known) => known.key === run));
  page.chosen = shown.length ? shown : null;
  parameters.delete("show");
  page.parameters = Object.fromEntries(parameters);
  page.view = page.views.find((view) => view.key === key) ?? page.views[0];
  render();
}

async function render() {
  page.leave?.();
  const container = document.getElementById("view");
  drawFrame();
  replace(container);
  document.title = `${page.view.title} · ${shownRuns().map((run) => run.name).join(", ")}`;
  const body = h("div", { class: `view ${page.view.key}` });
  container.append(body);
  const context = makeContext();
  try {
    await page.view.render(body, context);
  } catch (error) {
    if (!context.signal.aborted) replace(body, h("p", { class: "problem", role: "alert" }, error.message));
  }
}

function drawFrame() {
  head(document.getElementById("head"), page, {
    choose: (keys) => {
      page.chosen = keys.length === page.runs.length ? null : keys;
      history.replaceState(null, "", address(page.view.key, page.parameters));
      render();
    },
    rerender: render,
  });
  drawTabs();
}

function drawTabs() {
  const tabs = document.getElementById("tabs");
  const alarms = shownRuns().reduce((sum, run) => sum + run.alarms, 0);
  const links = page.views.map((view) =>
    h(
      "a",
      { href: address(view.key, {}), "aria-current": view === page.view ? "page" : null },
      view.title,
      view.key === "alarms" && alarms > 0 && h("span", { class: "badge", "aria-label": `${alarms} raised` }, alarms),
    ),
  );
  const focused = [...tabs.children].indexOf(document.activeElement);
  replace(tabs, links);
  if (focused >= 0) links[focused]?.focus();
  const open = links[page.views.indexOf(page.view)];
  if (open && tabs.scrollWidth > tabs.clientWidth) tabs.scrollLeft = open.offsetLeft - 24;
}

/** Ask what is new, and tell the open view. */
async function poll() {
  try {
    const runs = await fetchJson("api/runs");
    const before = new Map(page.runs.map((run) => [run.key, JSON.stringify([run.version, run.alarms, run.state])]));
    const changed = runs.some((run) => before.get(run.key) !== JSON.stringify([run.version, run.alarms, run.state]));
    page.runs = runs.map((run, place) => ({ ...run, colour: COLOURS[place % COLOURS.length] }));
    if (changed || !page.reachable) {
      page.reachable = true;
      drawFrame();
    }
    if (changed) for (const listener of page.listeners) listener(shownRuns());
  } catch (error) {
    if (page.reachable) console.info(`The server does not answer: ${error.message}`);
    page.reachable = false;
    drawFrame();
  }
  setTimeout(poll, document.hidden ? 5 * PAUSE_MS : PAUSE_MS);
}

document.getElementById("tabs").addEventListener("keydown", (event) => {
  const links = [...event.currentTarget.children];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const place = links.indexOf(document.activeElement);
  const target = event.key === "Home" ? 0 : event.key === "End" ? links.length - 1 : place + step;
  if (place < 0 || Number.isNaN(target)) return;
  event.preventDefault();
  links[(target + links.length) % links.length].focus();
});

applyTheme();
const found = await Promise.allSettled(modules.map((name) => import(`./views/${name}.js`)));
page.views = found.flatMap((result, place) => {
  if (result.status === "fulfilled") return [result.value];
  console.error(`The view ${modules[place]} cannot be loaded: ${result.reason}`);
  return [];
});
document.body.append(h("p", { id: "announcement", class: "hidden", role: "status" }));
const runs = await fetchJson("api/runs");
page.runs = runs.map((run, place) => ({ ...run, colour: COLOURS[place % COLOURS.length] }));
window.addEventListener("hashchange", follow);
follow();
setTimeout(poll, PAUSE_MS);
