// The context meter: a ring that fills as the shown chat grows towards the model's context.

import { byId } from "./dom.js";
import { count } from "./figures.js";

const NEARLY_FULL = 0.85;

/** Draws the tokens of the last answer with usage among `nodes`, against the model's context; hidden without either. */
export function drawMeter(nodes, context) {
  const meter = byId("meter");
  const usage = nodes.findLast((node) => node.usage)?.usage;
  meter.hidden = !usage || !context;
  if (meter.hidden) return;
  const used = usage.prompt_tokens + usage.completion_tokens;
  const share = Math.min(1, used / context);
  const text = `Context: ${count(used)} of ${count(context)} tokens (${Math.round(100 * share)} %)`;
  for (const [name, value] of Object.entries({ valuenow: used, valuemax: context, valuetext: text }))
    meter.setAttribute(`aria-${name}`, value);
  meter.title = text;
  meter.classList.toggle("full", share >= NEARLY_FULL);
  meter.style.setProperty("--share", `${(100 * Math.max(share, 0.02)).toFixed(1)}%`);
}
