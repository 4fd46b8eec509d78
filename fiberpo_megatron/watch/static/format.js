// Numbers and times as people read them.

/** Return a number with three significant digits, and a short form for large and small ones. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e7 || size < 1e-4)) return value.toExponential(Math.max(0, digits - 2)).replace(/\.0+e/, "e").replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

/** Return a number of an axis whose marks are `step` apart: so many digits that neighbours differ. */
export function axisNumber(value, step) {
  const size = Math.abs(value);
  if (!(step > 0) || (size !== 0 && (size >= 1e7 || size < 1e-4))) return number(value);
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  const text = value.toLocaleString("en-US", { minimumFractionDigits: 0, maximumFractionDigits: digits + 1 });
  return text === "-0" ? "0" : text;
}

/** Return a value with its unit; "share" and percent panels are shown in %. */
export function withUnit(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return `${number(100 * value)} %`;
  if (unit === "s") return duration(value);
  return unit ? `${number(value)} ${unit}` : number(value);
}

/** Return a time span. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001 && seconds > 0) return `${number(1e6 * seconds)} µs`;
  if (seconds < 1 && seconds > 0) return `${number(1e3 * seconds)} ms`;
  if (seconds < 90) return `${number(seconds)} s`;
  if (seconds < 5400) return `${number(seconds / 60)} min`;
  return seconds < 172800 ? `${number(seconds / 3600)} h` : `${number(seconds / 86400)} days`;
}

/** Return a count with separators. */
export function count(value) {
  return Math.round(value).toLocaleString("en-US");
}
