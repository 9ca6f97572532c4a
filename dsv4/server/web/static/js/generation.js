// Answers in progress: one at most per conversation; they run on when another conversation is shown.

import { ApiError, describe, streamChat } from "./api.js";

const TRIES = 20; // of a busy server that says when to ask again

const running = new Map(); // conversation id -> AbortController

// The browser cuts connections when the page is left or loaded again: not the server's failure.
let leaving = false;
addEventListener("beforeunload", () => {
  leaving = true;
  setTimeout(() => (leaving = false), 2000); // the page was not left after all
});

/** Is an answer being written in this conversation? */
export function isRunning(conversation) {
  return running.has(conversation.id);
}

/** Stops the conversation's answer; what has arrived stays. */
export function stop(conversation) {
  running.get(conversation.id)?.abort();
}

/** Streams the answer to what `body` resolves to into `node`, `changed` after each piece; settles when it has ended. */
export async function generate(conversation, node, body, changed) {
  const controller = new AbortController();
  const { signal } = controller;
  running.set(conversation.id, controller);
  const sent = { kind: "sent", since: Date.now() };
  Object.assign(node, { content: "", reasoning: "", status: "streaming", pieces: 0, phase: sent });
  try {
    const asked = await unlessStopped(body(), signal);
    await untilTaken(node, signal, changed, async () => {
      for await (const chunk of streamChat(asked, signal)) {
        if (apply(node, chunk)) changed();
      }
    });
    if (node.status === "streaming") node.status = "done";
  } catch (error) {
    if (signal.aborted || leaving) {
      node.status = "stopped";
    } else if (node.status === "streaming") {
      node.status = "error";
      node.error = describe(error);
    }
  } finally {
    running.delete(conversation.id);
    finish(node);
    changed();
  }
}

/** Runs `work`; while the server is too busy to take the request, again when it says. */
async function untilTaken(node, signal, changed, work) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await work();
    } catch (error) {
      const waits = error instanceof ApiError && error.kind === "busy" && error.retryAfter !== null;
      if (!waits || tries === TRIES) throw error;
      const pause = Math.max(error.retryAfter, 1) * 1000;
      node.phase = { kind: "busy", since: Date.now(), until: Date.now() + pause };
      changed();
      await unlessStopped(new Promise((resolve) => setTimeout(resolve, pause)), signal);
      node.phase = { kind: "sent", since: Date.now() };
    }
  }
}

function unlessStopped(promise, signal) {
  const stopped = new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  return Promise.race([promise, stopped]);
}

/** Adds one chunk to the answer. True when something to show has changed. */
function apply(node, chunk) {
  if (chunk.usage) node.usage = chunk.usage;
  if (chunk.timings) node.timings = chunk.timings;
  if (chunk.prompt_progress) node.phase = phaseOf(chunk, node.phase);
  const choice = chunk.choices?.[0];
  if (!choice) return Boolean(chunk.prompt_progress);
  if (choice.finish_reason) node.status = choice.finish_reason === "length" ? "length" : "done";
  const { reasoning_content: reasoning, content } = choice.delta ?? {};
  if (!reasoning && !content) return Boolean(choice.finish_reason);
  node.pieces += 1;
  const written = chunk.timings?.predicted_ms;
  if (reasoning) {
    node.thinkingSince ??= Date.now();
    node.thinkingFrom ??= written;
    node.reasoning += reasoning;
  }
  // Thinking lasts until the first piece of the answer.
  if (reasoning || (!node.content && node.reasoning)) node.thinkMs = written - node.thinkingFrom;
  if (content) node.content += content;
  return true;
}

/** Where a request is before its first token, from a chunk with progress. */
function phaseOf({ prompt_progress: progress, queue }, before) {
  const since = before?.since ?? Date.now();
  if (queue) return { kind: "queue", since, ahead: queue.position };
  return { kind: "reading", since, at: Date.now(), ...progress };
}

/** Drops what only an answer in progress has; the server's own count replaces the number of pieces where it came. */
function finish(node) {
  for (const name of ["phase", "thinkingSince", "thinkingFrom"]) delete node[name];
  node.tokens = node.usage?.completion_tokens ?? node.timings?.predicted_n ?? node.pieces;
}
