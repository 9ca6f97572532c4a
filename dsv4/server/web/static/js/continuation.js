// Figures of an answer that several requests wrote. Each later one reads the answer so far as a part of its prompt: the
// answer's prompt is the first request's, and only what was written is added up.

import { usageSoFar } from "./figures.js";

const WRITTEN = ["predicted_n", "predicted_ms", "draft_n", "draft_n_accepted", "queue_ms"];

/** Takes the figures {usage, timings, officialCost, tokens} off an answer that goes on. */
export function takeFigures(node) {
  const { usage, timings, officialCost, tokens = 0 } = node;
  for (const name of ["usage", "timings", "officialCost", "tokens"]) delete node[name];
  return { usage, timings, officialCost, tokens };
}

/**
 * Drops the fields of an answer in progress and adds the figures from before it went on; the server's token count, if
 * sent, replaces the number of pieces. An answer that has ended stays: a closed page ends its own before its requests.
 */
export function finish(node) {
  const { before } = node;
  if (!before) return;
  for (const name of ["phase", "thinkingSince", "thinkingFrom", "before"]) delete node[name];
  node.tokens = before.tokens + (node.usage?.completion_tokens ?? node.timings?.predicted_n ?? node.pieces);
  const figures = {
    usage: joined(before.usage ?? usageSoFar(before.timings), node.usage ?? usageSoFar(node.timings), usageOf),
    timings: joined(before.timings, node.timings, timingsOf),
    officialCost: joined(before.officialCost, node.officialCost, costOf),
  };
  for (const [name, value] of Object.entries(figures)) if (value) node[name] = value;
}

const joined = (before, after, join) => (before && after ? join(before, after) : (before ?? after));

function usageOf(before, after) {
  const written = before.completion_tokens + after.completion_tokens;
  const reasoning = (usage) => usage.completion_tokens_details?.reasoning_tokens ?? 0;
  return {
    ...before,
    completion_tokens: written,
    total_tokens: before.prompt_tokens + written,
    completion_tokens_details: { reasoning_tokens: reasoning(before) + reasoning(after) },
  };
}

function timingsOf(before, after) {
  const timings = { ...before };
  for (const name of WRITTEN) if (name in after) timings[name] = (before[name] ?? 0) + after[name];
  const paced = (part) => (part.predicted_per_second ?? 0) * (part.predicted_ms ?? 0);
  if (timings.predicted_ms) timings.predicted_per_second = (paced(before) + paced(after)) / timings.predicted_ms;
  return timings;
}

function costOf(before, after) {
  return { ...after, usd: before.usd + after.usd };
}
