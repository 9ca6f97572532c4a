// Figures of an answer that several requests wrote. Each later one reads the answer so far as a part of its prompt: the
// answer's prompt is the first request's, and only what was written is added up.

import { usageSoFar } from "./figures.js";

const WRITTEN = ["predicted_n", "predicted_ms", "draft_n", "draft_n_accepted", "queue_ms"];

/** Takes the figures {usage, timings, officialCost, tokens} off an answer that goes on. */
export function takeFigures(node) {
  const { usage, timings, officialCost, tokens = 0 } = node;
  for (const name of ["usage", "timings", "officialCost"]) delete node[name];
  return { usage, timings, officialCost, tokens };
}

/** Adds the figures from before an answer went on to those since. */
export function addFigures(node, before) {
  node.tokens += before.tokens;
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
