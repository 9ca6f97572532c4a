// The inspector: tokens of an answer as text, and for a chosen one the trace of the computation that wrote it.

import { ApiError, inspectAnswer, inspectToken } from "./api.js";
import { byId, h, icon } from "./dom.js";
import { bytes, count } from "./figures.js";
import { layerRows, nextTokens } from "./layers.js";
import { drawable, heatOf, meanHeat, scaleOf } from "./trace.js";
import { TRIES, unlessStopped } from "./waiting.js";

const DRAWN = 1500; // most tokens drawn as text, those about the chosen one
const PAUSE = 120; // ms without another choice before a token is traced

let answer = null; // {id, pieces, ...} of the server
let chosen = 0; // position of the chosen token
let trace = null; // of the token before it, which the computation read
let first = 0; // position of the first drawn token
let tokens = []; // elements, from `first` on
let pending = null; // AbortController
let timer = 0;
let opener = null; // element to return the focus to

/** Wires up the panel. */
export function setupInspector() {
  byId("inspector-close").append(icon("close"));
  byId("inspector-close").addEventListener("click", closeInspector);
  byId("inspector").addEventListener("keydown", (event) => {
    if (event.key === "Escape") closeInspector();
    else return;
    event.stopPropagation();
  });
  const text = byId("inspector-text");
  text.addEventListener("click", (event) => {
    const at = event.target.dataset?.at;
    if (at !== undefined) choose(Number(at));
  });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(chosen + step);
  });
}

/** Opens the panel for the answer with this id of the server. */
export async function openInspector(id) {
  opener = document.activeElement;
  reset();
  byId("inspector").hidden = false;
  document.documentElement.dataset.inspector = "open";
  byId("inspector-close").focus();
  say("Reading the answer's tokens");
  await attempt(async (signal) => {
    answer = await inspectAnswer(id, signal);
    choose(Math.min(answer.prompt_tokens, answer.pieces.length - 1));
  });
}

/** Closes the panel, if it is open. */
export function closeInspector() {
  if (byId("inspector").hidden) return;
  reset();
  byId("inspector").hidden = true;
  delete document.documentElement.dataset.inspector;
  opener?.focus();
}

function reset() {
  pending?.abort();
  clearTimeout(timer);
  [answer, trace, tokens] = [null, null, []];
  for (const id of ["facts", "text", "layers", "next"]) byId(`inspector-${id}`).replaceChildren();
}

/** Runs `work(signal)`, which replaces the work before it, and shows its failure. */
async function attempt(work) {
  pending?.abort();
  const controller = (pending = new AbortController());
  try {
    await work(controller.signal);
  } catch (error) {
    if (error.name === "AbortError" || controller.signal.aborted) return;
    if (!(error instanceof ApiError)) throw error;
    say(error.message, true);
  }
}

/** Result of `ask()`, asked again while the server is busy, mostly with the trace that this one replaces. */
async function patiently(ask, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ApiError) || error.kind !== "busy" || !error.retryAfter || tries === TRIES) throw error;
      if (tries > 1) say("The server traces another token first");
      await unlessStopped(new Promise((resolve) => setTimeout(resolve, error.retryAfter * 1000)), signal);
    }
  }
}

function say(text, failed = false) {
  const note = byId("inspector-note");
  note.textContent = text;
  note.classList.toggle("failed", failed);
}

/** Draws the text of DRAWN tokens about position `middle`, all of a shorter sequence. */
function drawText(middle) {
  const { pieces, prompt_tokens: prompt, accepted_drafts: accepted } = answer;
  const drafted = new Set(accepted);
  first = Math.max(0, Math.min(middle - DRAWN / 2, pieces.length - DRAWN));
  tokens = pieces.slice(first, first + DRAWN).map((piece, i) => {
    const at = first + i;
    const written = at >= prompt;
    const name = `token${written ? " written" : ""}${drafted.has(at - prompt) ? " drafted" : ""}`;
    return h("span", { class: name, dataset: { at } }, drawable(piece).replace(/\n/g, "⏎\n") || "·");
  });
  const cut = (hidden, which) =>
    hidden ? [h("p", { class: "inspector-cut" }, `${count(hidden)} ${which} tokens are not drawn.`)] : [];
  const after = pieces.length - first - tokens.length;
  byId("inspector-text").replaceChildren(...cut(first, "earlier"), ...tokens, ...cut(after, "later"));
}

function choose(at) {
  if (!answer || at < 1 || at >= answer.pieces.length) return;
  tokens[chosen - first]?.classList.remove("chosen");
  if (!tokens[at - first]) drawText(at);
  chosen = at;
  const token = tokens[at - first];
  token.classList.add("chosen");
  const box = byId("inspector-text");
  if (token.offsetTop < box.scrollTop || token.offsetTop + 30 > box.scrollTop + box.clientHeight)
    box.scrollTop = token.offsetTop - box.clientHeight / 2;
  clearTimeout(timer);
  timer = setTimeout(follow, PAUSE);
}

async function follow() {
  say(`Tracing token ${count(chosen + 1)}`);
  await attempt(async (signal) => {
    trace = await patiently(() => inspectToken(answer.id, chosen - 1, signal), signal);
    const whose = chosen < answer.prompt_tokens ? "of the prompt" : "written by the model";
    say(`Token ${count(chosen + 1)} of ${count(answer.pieces.length)}, ${whose}. Shown is the step that chose it.`);
    drawFacts();
    byId("inspector-layers").replaceChildren(...layerRows(answer, trace, paint));
    byId("inspector-next").replaceChildren(...nextTokens(trace, answer.pieces[chosen]));
    paint(null);
  });
}

/** Colours the text by the attention of one layer; null: mean of all. */
function paint(layer) {
  const { window, entries } = layer ? heatOf(layer) : meanHeat(trace);
  const [near, far] = [scaleOf(window), scaleOf(entries)];
  tokens.forEach((token, i) => {
    token.style.setProperty("--near", near(first + i).toFixed(3));
    token.style.setProperty("--far", far(first + i).toFixed(3));
  });
}

function drawFacts() {
  const { prompt_tokens: prompt, cached_tokens: cached, answer_tokens: written } = answer;
  const { num_draft_tokens: drafted, num_accepted_tokens: accepted } = answer;
  const parts = Object.entries(trace.cache_bytes).map(([name, size]) => `${name.replace("_", " ")} ${bytes(size)}`);
  const total = Object.values(trace.cache_bytes).reduce((sum, size) => sum + size, 0);
  const facts = [
    ["Prompt", `${count(prompt)} tokens, ${count(cached)} of them from the cache`],
    ["Answer", `${count(written)} tokens`],
    ["Cache here", `${bytes(total)}: ${parts.join(", ")}`],
    [
      "Drafts",
      drafted
        ? `${count(accepted)} of ${count(drafted)} drafted tokens accepted (underlined)`
        : "none (dsv4 serve --speculate K turns them on)",
    ],
  ];
  byId("inspector-facts").replaceChildren(...facts.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]));
}
