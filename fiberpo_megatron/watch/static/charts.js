// Charts of a view: each is fetched when it comes into sight, follows the run, and shares its range of steps and its
// cursor with the others.

import { h, replace } from "./dom.js";
import { number } from "./format.js";
import { draw, lineData, stackData, styles } from "./plot.js";

const HEIGHT = 190;
const logPanels = new Map(); // by the panel's title: the choice stays when a view is left

/** Holds the charts of one view. `options` has smooth: "auto", or the number of rows of the moving mean (0: none). */
export class Charts {
  constructor(context, options = {}) {
    this.context = context;
    this.smooth = options.smooth ?? "auto";
    this.charts = [];
    this.alarms = new Map(); // the events of each run, by its key
    this.loadAlarms(context.runs);
    this.observer = new IntersectionObserver((entries) => entries.forEach((entry) => entry.target.chart.seen(entry.isIntersecting)), {
      rootMargin: "200px",
    });
    this.sizes = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.chart?.resize()));
    context.range.subscribe(() => this.charts.forEach((chart) => chart.stale()));
    context.onUpdate((runs) => this.update(runs));
    context.onLeave(() => this.close());
  }

  /** Add a panel (telemetry/panels.py) to `parent`. A stack of several runs becomes one chart for each. */
  add(parent, panel) {
    const groups = panel.form === "stack" ? this.context.runs.map((run) => [run]) : [this.context.runs];
    for (const runs of groups) {
      const chart = new Chart(this, panel, runs, groups.length > 1);
      this.charts.push(chart);
      parent.append(chart.figure);
      this.observer.observe(chart.figure);
      this.sizes.observe(chart.plotArea);
    }
  }

  /** Take charts away again. */
  clear() {
    this.charts.forEach((chart) => chart.close());
    this.charts = [];
  }

  setSmooth(smooth) {
    this.smooth = smooth;
    this.charts.forEach((chart) => chart.stale());
  }

  setLog(log) {
    this.charts.forEach((chart) => chart.setLog(log));
  }

  /** Return the steps that are shown: the shared range, or all of the shown runs. */
  range(runs) {
    const range = this.context.range.get();
    if (range) return range;
    const kinds = runs.flatMap((run) => Object.values(run.kinds));
    return kinds.length ? [Math.min(...kinds.map((kind) => kind.first)), Math.max(...kinds.map((kind) => kind.last))] : [0, 1];
  }

  /** Return the number of rows of the moving mean: by default a fifteenth of what is shown, as in the report. */
  window(runs) {
    if (this.smooth !== "auto") return this.smooth;
    const [from, to] = this.range(runs);
    const span = Math.round((to - from) / 15);
    return span >= 3 ? span : 0;
  }

  /** Get the alarms of the runs, which are marked in the charts of their metrics. */
  async loadAlarms(runs) {
    try {
      for (const run of runs) this.alarms.set(run.key, await this.context.fetchJson("api/alarms", { run: run.key }));
    } catch (error) {
      if (error.name !== "AbortError") console.info(`The alarms cannot be shown in the charts: ${error.message}`);
      return;
    }
    this.charts.forEach((chart) => chart.marks().length > 0 && chart.render());
  }

  update(runs) {
    this.loadAlarms(runs);
    this.charts.forEach((chart) => {
      chart.runs = chart.runs.map((run) => runs.find((one) => one.key === run.key) ?? run);
      chart.stale();
    });
  }

  /** Show the cursor of one chart in the others. */
  moved(from, x) {
    if (this.moving) return;
    this.moving = true;
    for (const chart of this.charts) if (chart !== from) chart.pointAt(x);
    this.moving = false;
  }

  close() {
    this.observer.disconnect();
    this.sizes.disconnect();
    this.clear();
  }
}

class Chart {
  constructor(group, panel, runs, named) {
    this.group = group;
    this.panel = panel;
    this.runs = runs;
    this.log = logPanels.get(panel.title) ?? panel.log;
    this.visible = false;
    this.dirty = true;
    this.off = new Set();
    const title = named ? `${panel.title} · ${runs[0].name}` : panel.title;
    this.label = title;
    this.plotArea = h("div", {
      class: "plot",
      tabindex: 0,
      role: "application",
      "aria-label": `Chart: ${title}. Arrow keys move the cursor, plus and minus zoom, 0 shows all steps, L switches the logarithmic axis.`,
      onkeydown: (event) => this.key(event),
      onblur: () => this.group.moved(null, null),
    });
    this.plotArea.chart = this;
    this.legend = h("ul", { class: "legend" });
    this.alarmNote = h("div", { class: "alarm-note" });
    this.logButton = h(
      "button",
      { type: "button", class: "log", "aria-pressed": String(this.log), title: "Logarithmic axis", onclick: () => this.setLog(!this.log) },
      "log",
    );
    this.figure = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("span", { class: "title" }, title), panel.unit && h("span", { class: "unit" }, panel.unit), panel.form === "lines" && this.logButton),
      this.plotArea,
      this.legend,
      this.alarmNote,
      panel.note && h("p", { class: "note" }, panel.note),
    );
    this.figure.chart = this;
  }

  seen(visible) {
    this.visible = visible;
    if (visible && this.dirty) this.load();
  }

  stale() {
    this.dirty = true;
    if (this.visible) this.load();
  }

  setLog(log) {
    if (this.panel.form !== "lines") return;
    this.log = log;
    logPanels.set(this.panel.title, log);
    this.logButton.setAttribute("aria-pressed", String(log));
    this.render();
  }

  async load() {
    if (this.loading) return;
    this.loading = true;
    try {
      while (this.dirty && this.visible) {
        this.dirty = false;
        const { context } = this.group;
        const range = context.range.get();
        this.found = await context.fetchJson("api/curves", {
          run: this.runs.map((run) => run.key),
          curve: this.panel.curves.map(({ kind, metric, minus, band }) => JSON.stringify({ kind, metric, minus, band })),
          from: range?.[0],
          to: range?.[1],
          points: Math.max(100, Math.round(this.plotArea.clientWidth)),
          smooth: this.group.window(this.runs),
          form: this.panel.form,
        });
        this.render();
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        this.dirty = true;
        this.values = null;
        replace(this.legend, h("li", { class: "muted" }, `not loaded: ${error.message}`));
      }
    } finally {
      this.loading = false;
    }
  }

  render() {
    if (!this.found) return;
    const stack = this.panel.form === "stack";
    const factor = this.panel.percent ? 100 : 1;
    this.drawn = styles(this.panel, this.runs).map((style, place) => ({ ...style, off: this.off.has(place) }));
    const made = stack ? stackData(this.found, this.drawn, factor) : lineData(this.found, this.drawn, factor, this.log);
    this.own = made.own;
    const cursor = this.plot?.cursor.left >= 0 ? this.plot.posToVal(this.plot.cursor.left, "x") : null;
    this.plot?.destroy();
    this.plot = draw(
      this.plotArea,
      made,
      {
        width: this.plotArea.clientWidth,
        height: HEIGHT,
        log: this.log,
        stack,
        percent: this.panel.percent,
        range: this.group.range(this.runs),
        unit: this.panel.unit,
        label: this.label,
        marks: this.marks().map((event) => event.done),
      },
      {
        zoom: ([from, to]) => this.zoom(from, to),
        reset: () => this.group.context.range.set(null),
        moved: (plot, x) => {
          if (plot !== this.plot) return;
          this.writeLegend(x);
          this.group.moved(this, x);
        },
      },
    );
    this.figure.dataset.points = String(this.own.reduce((sum, one) => sum + (one?.values.x.length ?? 0), 0));
    if (cursor !== null) this.pointAt(cursor);
    this.writeLegend(cursor);
    this.writeAlarms();
  }

  /** Return the alarms that were raised about a metric of this chart. */
  marks() {
    const metrics = new Set(this.panel.curves.map((curve) => curve.metric));
    const events = this.runs.flatMap((run) => this.group.alarms.get(run.key) ?? []);
    return events.filter((event) => event.state === "raised" && metrics.has(event.metric));
  }

  /** Say in words what the lines in the chart stand for. */
  writeAlarms() {
    const texts = [...new Set(this.marks().map((event) => `alarm ${event.rule.replaceAll("_", " ")}, step ${event.done}`))];
    replace(this.alarmNote, texts.length > 0 && h("a", { href: "#alarms" }, texts.slice(0, 3).join("; ")));
  }

  zoom(from, to) {
    if (to > from) this.group.context.range.set([from, to]);
  }

  pointAt(x) {
    if (!this.plot) return;
    const left = x === null ? -10 : this.plot.valToPos(x, "x");
    this.plot.setCursor({ left, top: x === null ? -10 : 0 }, false);
    this.writeLegend(x);
  }

  /** Write label and value of every curve: at step `x`, or the last ones. */
  writeLegend(x) {
    if (!this.drawn) return;
    if (this.values?.length !== this.drawn.length) this.makeLegend();
    this.stepItem.textContent = x === null ? "last" : `step ${number(Math.round(x), 9)}`;
    this.drawn.forEach((style, place) => {
      const points = this.found[style.run]?.[style.place];
      this.values[place].textContent = points ? number(valueAt(points, x) === null ? null : valueAt(points, x) * (this.panel.percent ? 100 : 1)) : "–";
    });
  }

  /** Make an entry for each curve: its dash, its name, and a value for each run. */
  makeLegend() {
    this.values = this.drawn.map(() => h("b", {}));
    this.stepItem = h("li", { class: "at" });
    const several = this.runs.length > 1;
    const alone = several && this.panel.curves.length === 1;
    const items = this.panel.curves.map((curve, at) => {
      const own = this.drawn.map((style, place) => [style, place]).filter(([style]) => style.place === at);
      const buttons = own.map(([style, place]) => this.legendButton(style, place, several ? style.runName : curve.label, alone));
      const dash = several && !alone && h("span", { class: `dash dash-${at % 4}` });
      return h("li", {}, several && !alone && h("span", { class: "curve" }, dash, curve.label), buttons);
    });
    replace(this.legend, this.stepItem, items);
  }

  legendButton(style, place, name, written) {
    const toggle = (event) => {
      if (this.off.has(place)) this.off.delete(place);
      else this.off.add(place);
      event.currentTarget.setAttribute("aria-pressed", String(!this.off.has(place)));
      this.render();
    };
    const text = this.runs.length === 1 || written ? name : h("span", { class: "hidden" }, `${style.curve.label} of ${name}`);
    return h(
      "button",
      { type: "button", "aria-pressed": "true", title: name, onclick: toggle },
      h("span", { class: "swatch", style: { background: style.colour } }),
      text,
      this.values[place],
    );
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.plot) return;
    const steps = this.plot.data[0];
    const [from, to] = this.group.range(this.runs);
    const at = this.plot.cursor.left >= 0 ? this.plot.posToVal(this.plot.cursor.left, "x") : to;
    const place = closest(steps, at);
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    const span = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
    if (move !== undefined) this.moveTo(steps[Math.max(0, Math.min(steps.length - 1, place + move * (event.shiftKey ? 10 : 1)))]);
    else if (span) this.zoomBy(at, span, from, to);
    else if (event.key === "0") this.group.context.range.set(null);
    else if (event.key.toLowerCase() === "l") this.setLog(!this.log);
    else if (event.key === "Escape") this.plotArea.blur();
    else return;
    event.preventDefault();
  }

  moveTo(x) {
    if (x === undefined) return;
    this.pointAt(x);
    this.group.moved(this, x);
    const values = this.drawn.map((style, place) => `${style.label} ${this.values[place].textContent}`);
    this.group.context.announce(`step ${x}: ${values.join(", ")}`);
  }

  zoomBy(at, span, from, to) {
    const half = ((to - from) * span) / 2;
    const all = this.runs.flatMap((run) => Object.values(run.kinds));
    const range = [Math.max(Math.min(...all.map((kind) => kind.first)), Math.round(at - half)), Math.min(Math.max(...all.map((kind) => kind.last)), Math.round(at + half))];
    this.zoom(...range);
    this.pointAt(at);
  }

  resize() {
    const width = this.plotArea.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  close() {
    this.plot?.destroy();
    this.plot = null;
    this.figure.remove();
  }
}

function closest(steps, x) {
  let best = 0;
  for (let place = 1; place < steps.length; place++) if (Math.abs(steps[place] - x) < Math.abs(steps[best] - x)) best = place;
  return best;
}

/** Return a curve's value at the step nearest to x, or the last one for null. */
function valueAt(points, x) {
  const known = points.x.map((step, place) => [step, points.y[place]]).filter(([, value]) => value !== null);
  if (!known.length) return null;
  return x === null ? known[known.length - 1][1] : known[closest(known.map(([step]) => step), x)][1];
}
