// One uPlot drawing: lines with their moving means and bands, or stacked areas.

import uPlot from "./uplot/uPlot.esm.js";
import { axisNumber, number } from "./format.js";
import { isDark, themeColour } from "./theme.js";

export const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b7280", "#8c564b"];
const DASHES = [null, [7, 4], [2, 3], [9, 3, 2, 3]];
const FONT = '11px system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif';

/** Return a colour that can be read on the ground of the theme: dark ones are lightened on a dark ground. */
export function readable(colour) {
  if (!isDark()) return colour;
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const light = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  const share = light < 130 ? 0.34 : 0;
  return `#${parts.map((part) => Math.round(part + share * (255 - part)).toString(16).padStart(2, "0")).join("")}`;
}

/** Return how each curve of each run is drawn: [{run, place, curve, colour, dash, label}]. With several runs the colour
 * is the run's, and curves differ by their dashes. */
export function styles(panel, runs) {
  return runs.flatMap((run) =>
    panel.curves.map((curve, place) => ({
      run: run.key,
      place,
      curve,
      colour: readable(runs.length > 1 ? run.colour : (curve.colour ?? PALETTE[place % PALETTE.length])),
      dash: runs.length > 1 ? DASHES[place % DASHES.length] : null,
      label: runs.length > 1 ? `${curve.label} of ${run.name}` : curve.label,
      runName: run.name,
    })),
  );
}

/** Return {data, series, bands, own} for lines: one table for all curves; `own[i]` names the series of style i. */
export function lineData(found, drawn, factor, log) {
  const tables = [];
  const series = [{}];
  const bands = [];
  const own = [];
  const usable = (y) => y.map((value) => (value === null || (log && value <= 0) ? null : factor * value));
  const add = (x, ys, specs) => {
    tables.push([x, ...ys.map(usable)]);
    specs.forEach((spec) => series.push(spec));
    return series.length - specs.length;
  };
  for (const style of drawn) {
    const points = found[style.run]?.[style.place];
    own.push(null);
    if (!points || !points.x.length || style.off) continue;
    const alpha = (share) => style.colour + Math.round(255 * share).toString(16).padStart(2, "0");
    if (points.band_x) {
      const at = add(points.band_x, [points.high, points.low], [0, 1].map(() => ({ stroke: null, points: { show: false } })));
      bands.push({ series: [at, at + 1], fill: alpha(0.14) });
    }
    const few = points.x.length <= 40;
    const raw = add(points.x, [points.y], [
      {
        stroke: points.smooth_x ? alpha(0.34) : style.colour,
        width: points.smooth_x ? 1 : 1.5,
        dash: points.smooth_x ? null : style.dash,
        points: { show: style.curve.markers || points.x.length === 1 || few, size: style.curve.markers ? 6 : 4, fill: style.colour, stroke: style.colour },
        spanGaps: style.curve.markers,
      },
    ]);
    if (points.smooth_x) {
      add(points.smooth_x, [points.smooth_y], [{ stroke: style.colour, width: 1.8, dash: style.dash, points: { show: false } }]);
    }
    own[own.length - 1] = { series: raw, values: points };
  }
  return { data: tables.length ? uPlot.join(tables) : [[]], series, bands, own };
}

/** Return the same for stacked areas of one run: the highest sum is drawn first, the others over it. */
export function stackData(found, drawn, factor) {
  const shown = drawn.filter((style) => !style.off && found[style.run]?.[style.place]?.x.length);
  const x = shown.length ? found[shown[0].run][shown[0].place].x : [];
  const sums = [];
  let below = x.map(() => 0);
  for (const style of shown) {
    const at = new Map(found[style.run][style.place].x.map((step, place) => [step, place]));
    const y = found[style.run][style.place].y;
    below = below.map((sum, place) => sum + factor * (y[at.get(x[place])] ?? 0));
    sums.push({ style, y: below });
  }
  const ordered = [...sums].reverse();
  return {
    data: [x, ...ordered.map((one) => one.y)],
    series: [
      {},
      ...ordered.map(({ style }) => ({
        stroke: themeColour("ground"),
        width: 0.6,
        fill: style.colour,
        points: { show: x.length === 1, size: 6, fill: style.colour },
      })),
    ],
    bands: [],
    own: drawn.map((style) => {
      const place = ordered.findIndex((one) => one.style === style);
      return place < 0 ? null : { series: place + 1, values: found[style.run][style.place] };
    }),
  };
}

/** Make a drawing in `element`. `actions` has zoom([from, to]), reset() and moved(x or null). */
export function draw(element, made, { width, height, log, stack, percent, range, unit, label, marks }, actions) {
  const axis = { stroke: themeColour("axis"), font: FONT, ticks: { show: false }, grid: { stroke: themeColour("grid"), width: 1 } };
  const options = {
    width,
    height,
    padding: [8, 10, 0, 0],
    legend: { show: false },
    focus: { alpha: 0.35 },
    scales: {
      x: { time: false, range: () => (range[0] === range[1] ? [range[0] - 1, range[1] + 1] : range) },
      y: log ? { distr: 3 } : { range: (_, low, high) => limits(low, high, stack, percent) },
    },
    axes: [
      { ...axis, size: 24, gap: 4, values: (_, values) => values.map((value) => (Number.isInteger(value) ? value.toLocaleString("en-US") : "")) },
      {
        ...axis,
        grid: { ...axis.grid, filter: (_, splits) => (log ? splits.map((value) => (isDecade(value) ? value : null)) : splits) },
        size: (_, values) => 14 + 6.4 * Math.max(3, ...(values ?? []).map((value) => (value ?? "").length)),
        gap: 4,
        values: (_, values, axisAt, space, step) => values.map((value) => (value === null ? "" : log ? number(value) : axisNumber(value, step))),
      },
    ],
    series: made.series.map((one, place) => (place ? { scale: "y", ...one } : {})),
    bands: made.bands,
    cursor: {
      y: false,
      drag: { x: true, y: false, setScale: false },
      points: { show: !stack, size: 6 },
      bind: { dblclick: () => () => actions.reset() },
      dataIdx: (plot, series, place) => nearest(plot.data[series], place),
    },
    hooks: {
      draw: [(plot) => drawMarks(plot, marks)],
      setSelect: [
        (plot) => {
          const { left, width: wide } = plot.select;
          if (wide < 4) return;
          actions.zoom([left, left + wide].map((pixel) => Math.round(plot.posToVal(pixel, "x"))));
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        },
      ],
      setCursor: [(plot) => actions.moved(plot, plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null)],
    },
  };
  const plot = new uPlot(options, made.data, element);
  plot.root.querySelector("canvas")?.setAttribute("aria-label", `${label}${unit ? `, in ${unit}` : ""}`);
  return plot;
}

/** Draw a line at each step at which an alarm was raised about a metric of this chart. */
function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = themeColour("bad");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  for (const step of marks) {
    const x = plot.valToPos(step, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

/** Return the row nearest to `place` at which a series has a value. */
function nearest(values, place) {
  for (let away = 0; away < values.length; away++) {
    if (values[place - away] !== null && values[place - away] !== undefined) return place - away;
    if (values[place + away] !== null && values[place + away] !== undefined) return place + away;
  }
  return place;
}

function isDecade(value) {
  const power = Math.log10(value);
  return Math.abs(power - Math.round(power)) < 1e-9;
}

function limits(low, high, stack, percent) {
  if (low === null || high === null) return [0, 1];
  if (stack) return [0, percent && high > 99 && high < 101 ? 100 : high * 1.04 || 1];
  const room = 0.07 * (high - low) || 0.05 * Math.abs(high) || 1;
  const bottom = low >= 0 && low - room < 0 ? 0 : low - room;
  const top = percent && high <= 100 && high + room > 100 ? 100 : high + room;
  return [bottom, top];
}
