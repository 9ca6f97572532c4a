// Answers in progress: one at most per conversation; they run on when another conversation is shown.

import { describe, streamChat } from "./api.js";

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
  running.set(conversation.id, controller);
  const clock = startClock(node);
  try {
    const asked = await unlessStopped(body(), controller.signal);
    for await (const chunk of streamChat(asked, controller.signal)) {
      if (apply(node, chunk, clock)) changed();
    }
    if (node.status === "streaming") node.status = "done";
  } catch (error) {
    if (controller.signal.aborted || leaving) {
      node.status = "stopped";
    } else if (node.status === "streaming") {
      node.status = "error";
      node.error = describe(error);
    }
  } finally {
    running.delete(conversation.id);
    finish(node, clock);
    changed();
  }
}

function unlessStopped(promise, signal) {
  const stopped = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  return Promise.race([promise, stopped]);
}

function startClock(node) {
  Object.assign(node, { content: "", reasoning: "", status: "streaming", pieces: 0, startedAt: Date.now() });
  return { sent: performance.now(), first: null, last: null };
}

/** Adds one chunk to the answer. True when something to show has changed. */
function apply(node, chunk, clock) {
  if (chunk.usage) node.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) node.status = choice.finish_reason === "length" ? "length" : "done";
  const { reasoning_content: reasoning, content } = choice.delta ?? {};
  if (!reasoning && !content) return Boolean(choice.finish_reason);
  clock.last = performance.now();
  clock.first ??= clock.last;
  node.waitMs = clock.first - clock.sent;
  node.pieces += 1;
  node.speed = speed(node.pieces, clock);
  if (reasoning) {
    node.thinkingSince ??= Date.now();
    node.reasoning += reasoning;
    node.thinkMs = clock.last - clock.first;
  }
  if (content) {
    // Thinking has lasted until the first piece of the answer.
    if (!node.content && node.reasoning) node.thinkMs = clock.last - clock.first;
    node.content += content;
  }
  return true;
}

/** The server's own count replaces the number of pieces where it came. */
function finish(node, clock) {
  delete node.startedAt;
  delete node.thinkingSince;
  node.tokens = node.usage?.completion_tokens ?? node.pieces;
  node.speed = speed(node.tokens, clock);
}

/** Tokens a second: those after the first over the time they took, so that reading the prompt does not count. */
function speed(tokens, clock) {
  const seconds = (clock.last - clock.first) / 1000;
  return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
}
