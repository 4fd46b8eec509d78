// Why a token learned or did not: sentences from the gates of its levels and from its clip.

import { number } from "../format.js";

/** Return the channel of a token: 0 (plus) for a ratio of one or more, 1 (minus) below. */
export function channel(record, i) {
  return (last(record.tokens.log_ratio, i) ?? 0) >= 0 ? 0 : 1;
}

/** Return the value of the last optimiser step that saw the token. */
export function last(rows, i) {
  const row = rows?.[rows.length - 1];
  return row?.[i] ?? null;
}

/** Return [node, share] for each node of a level to which a token belongs. */
export function nodesOf(level, i) {
  const of = level.of[i];
  if (of === null || of === undefined) return [];
  return Array.isArray(of) ? of.map(([node, share]) => [level.nodes[node], share]) : [[level.nodes[of], 1]];
}

/** Return what stopped a token: {kind, level, text}, the most telling first; empty if it passed everywhere. */
export function reasons(record, i) {
  const tokens = record.tokens;
  if (!tokens.sampled[i]) return [{ kind: "environment", text: "The environment wrote this token, or a branch repeats it; it is not trained on." }];
  if (last(tokens.log_ratio, i) === null) return [{ kind: "unknown", text: "Nothing is recorded of this token." }];
  const found = [];
  if (tokens.weight?.[i] === 0) found.push({ kind: "masked", text: "A mask has set the token's weight to 0." });
  if (tokens.advantage?.[i] === 0) found.push({ kind: "advantage", text: "The advantage is 0, so that the reward teaches nothing here." });
  if (tokens.free && tokens.free[i] === 0) found.push({ kind: "clipped", text: clipText(record, i) });
  const own = channel(record, i);
  for (const level of record.levels) {
    for (const [node, share] of nodesOf(level, i)) {
      if (node.state[own] !== "pass") found.push({ kind: node.state[own], level: level.name, text: gateText(level, node, own, share) });
    }
  }
  return found;
}

/** Return for example "trajectory: S+ 0.31 over 0.12, zeroed". */
function gateText(level, node, own, share) {
  const sign = own ? "−" : "+";
  const aggregate = node.S[own];
  const residual = node.D[own];
  const name = level.keys.includes("expert") ? `${level.name} (partition ${node.id.expert}, share ${number(share)})` : level.name;
  const above = aggregate - residual;
  const compared = Math.abs(above) <= 1e-9 * Math.abs(aggregate) ? `S${sign} ${number(aggregate)}` : `S${sign} ${number(aggregate)} less ${number(above)} of the level above`;
  return `${name}: ${compared} over ${number(node.C[own])}, ${node.state[own] === "rollback" ? "rolled back" : "zeroed"}`;
}

/** Return for example "clipped: ratio 1.34 over 1.2". */
function clipText(record, i) {
  const tokens = record.tokens;
  const value = tokens.clip_value?.[i];
  if (value === null || value === undefined) return "clipped";
  const figure = record.clip_figures[tokens.clip_figure[i]];
  const high = tokens.clip_high[i];
  const low = tokens.clip_low[i];
  const bound = high !== null && value > high ? `over ${number(high)}` : low !== null && value < low ? `under ${number(low)}` : "at its bound";
  const stays = last(tokens.coefficient, i) !== 0 && !record.levels.length ? "; its gradient stays" : "";
  return `clipped: ${figure} ${number(value)} ${bound}${stays}`;
}

/** Return one sentence about what the token's step did. */
export function verdict(record, i) {
  const c = last(record.tokens.coefficient, i);
  if (c === null) return "";
  if (c === 0) return "It did not learn: c = 0.";
  const scale = record.tokens.weight?.[i] * record.tokens.advantage?.[i];
  const part = scale ? ` = ${number(c / scale)} × weight × advantage` : "";
  return `It became ${c > 0 ? "more" : "less"} likely: c = ${number(c)}${part}.`;
}
