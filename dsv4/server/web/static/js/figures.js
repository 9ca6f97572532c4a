// Figures about time: durations, progress of a request, speed of an answer. All from the server's clock.

const FEWEST_TOKENS = 10; // least tokens for a meaningful rate
const SHORTEST = 50; // ms, least duration for a meaningful rate
const SHORT_THOUGHT = 100; // ms; a shorter thinking duration is not shown
const UNSEEN = 600; // ms; a shorter wait is not described

/** "12,345". */
export const count = (number) => number.toLocaleString("en");

/** "812 B", "3.4 KB", "12 MB". */
export function bytes(size) {
  const power = size < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(size) / 3));
  const value = size / 1000 ** power;
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${["B", "KB", "MB", "GB"][power]}`;
}

/** Formats milliseconds: "3.2 s", "1 min 5 s". */
export function duration(ms) {
  const seconds = ms / 1000;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

/** Status text of an unanswered request; "" while there is nothing to report. */
export function describePhase(phase, now) {
  const waited = now - (phase?.since ?? now);
  if (phase?.kind === "busy")
    return `The server is busy, trying again in ${Math.ceil(Math.max(phase.until - now, 0) / 1000)} s`;
  if (waited < UNSEEN) return "";
  if (phase.kind === "queue") return phase.ahead ? `Waiting: ${count(phase.ahead)} ahead` : "Waiting: next in line";
  if (phase.kind === "reading") return describeReading(phase, now);
  if (waited < 3000) return "";
  // No response from the server yet. Browsers open at most six connections per server, over all tabs.
  const tabs = waited > 10_000 ? ", which other tabs may keep busy" : "";
  return `Waiting for a connection to the server${tabs}`;
}

function describeReading(phase, now) {
  const { total, processed } = phase;
  if (processed >= total) return "";
  const share = Math.floor((100 * processed) / total);
  return `Reading ${count(processed)} of ${count(total)} tokens (${share} %)${timeLeft(phase, now)}`;
}

/** ", about 8 s left", extrapolated from the pace so far and counting down between reports. */
function timeLeft({ total, cache, processed, time_ms: spent, at }, now) {
  if (spent < 800 || processed <= cache) return "";
  const left = ((total - processed) * spent) / (processed - cache) - (now - at);
  if (left < 1000) return "";
  return left < 90_000 ? `, about ${Math.round(left / 1000)} s left` : `, about ${Math.round(left / 60_000)} min left`;
}

/** Share of the prompt that is prefilled; null while there is nothing to show. */
export function shareRead(phase, now) {
  const shown = phase?.kind === "reading" && now - phase.since >= UNSEEN && phase.processed < phase.total;
  return shown ? phase.processed / phase.total : null;
}

/** Label of the thinking panel after thinking has ended. */
export function describeThinking(ms) {
  return ms >= SHORT_THOUGHT ? `Thought for ${duration(ms)}` : "Thoughts";
}

/** "312 tokens · 48.1 tokens/s"; without the rate if there is too little to measure. */
export function describeSpeed(tokens, timings) {
  if (!tokens) return "";
  const text = `${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`;
  const { predicted_n: written, predicted_ms: ms, predicted_per_second: rate } = timings ?? {};
  if (!rate || written < FEWEST_TOKENS || ms < SHORTEST) return text;
  return `${text} · ${perSecond(rate)}`;
}

/** Details of an answer, [name, text] each: model, tokens, waiting, drafts, cost. */
export function describeDetails({ model, usage: whole, timings, officialCost }) {
  const details = [["Model", model]];
  const usage = whole ?? usageSoFar(timings);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const found = cached ? `, ${count(cached)} of them cached` : "";
    details.push(["Prompt", `${count(usage.prompt_tokens)} tokens${found}${promptSpeed(timings)}`]);
    const reasoning = usage.completion_tokens_details?.reasoning_tokens;
    const thoughts = reasoning ? `, ${count(reasoning)} of them reasoning` : "";
    details.push(["Answer", `${count(usage.completion_tokens)} tokens${thoughts}`]);
  }
  if (timings?.queue_ms >= SHORT_THOUGHT) details.push(["Waited", duration(timings.queue_ms)]);
  const { draft_n: drafted, draft_n_accepted: accepted } = timings ?? {};
  if (drafted) details.push(["Drafts", `${count(accepted)} of ${count(drafted)} tokens accepted`]);
  if (officialCost) {
    details.push(["On DeepSeek's API", `${dollars(officialCost.usd)} (as ${officialCost.model})`]);
  }
  return details.filter(([, text]) => text);
}

/** Usage of an answer that was stopped before the server said it; undefined before its first token. */
export function usageSoFar({ cache_n: cached = 0, prompt_n: read, predicted_n: written } = {}) {
  if (!written) return undefined;
  return { prompt_tokens: cached + read, prompt_tokens_details: { cached_tokens: cached }, completion_tokens: written };
}

/** ", read in 0.4 s, 812 tokens/s"; without the rate if there is too little to measure. */
function promptSpeed({ prompt_n: read, prompt_ms: ms, prompt_per_second: rate } = {}) {
  if (!(ms >= SHORTEST)) return "";
  return `, read in ${duration(ms)}${rate && read >= FEWEST_TOKENS ? `, ${perSecond(rate)}` : ""}`;
}

/** "48.1 tokens/s", "1,234 tokens/s". */
const perSecond = (rate) => `${rate < 100 ? rate.toFixed(1) : count(Math.round(rate))} tokens/s`;

/** "$0.00012". */
function dollars(usd) {
  return usd.toLocaleString("en", { style: "currency", currency: "USD", maximumSignificantDigits: 2 });
}
