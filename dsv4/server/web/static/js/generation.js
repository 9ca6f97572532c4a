// Answers in progress: at most one per conversation; they continue while another conversation is shown.

import { ApiError, describe, streamChat } from "./api.js";
import { finish, takeFigures } from "./continuation.js";
import { TRIES, unlessStopped } from "./waiting.js";

const running = new Map(); // conversation id -> AbortController

// The browser cuts connections when the page is left or reloaded: no failure of the server.
let leaving = false;
addEventListener("beforeunload", () => {
  leaving = true;
  setTimeout(() => (leaving = false), 2000); // the page was not left after all
});

/** True if this conversation has an answer in progress. */
export function isRunning(conversation) {
  return running.has(conversation.id);
}

/** Stops the conversation's answer; the received part stays. */
export function stop(conversation) {
  running.get(conversation.id)?.abort();
}

/**
 * Sends the request that `body` resolves to and streams the answer into `node`; calls `changed` after each piece.
 * A node that has text already is continued.
 */
export async function generate(conversation, node, body, changed) {
  const controller = new AbortController();
  const { signal } = controller;
  running.set(conversation.id, controller);
  const sent = { kind: "sent", since: Date.now() };
  node.before = takeFigures(node);
  for (const name of ["error", "toolCalls"]) delete node[name]; // a call that was cut off is not sent: it begins anew
  Object.assign(node, { content: node.content ?? "", reasoning: node.reasoning ?? "", status: "streaming", pieces: 0, phase: sent });
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
      node.error = describe(error, (conversation.nodes[node.parent]?.parent ?? null) === null);
    }
  } finally {
    running.delete(conversation.id);
    finish(node);
    changed();
  }
}

/** Runs `work`; if the server is too busy, retries when its Retry-After has passed. */
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

/** Adds one chunk to the answer; true if the view has to change. */
function apply(node, chunk) {
  if (chunk.id) node.answerId = chunk.id;
  if (chunk.usage) node.usage = chunk.usage;
  if (chunk.timings) node.timings = chunk.timings;
  if (chunk.official_cost) node.officialCost = chunk.official_cost;
  if (chunk.prompt_progress) node.phase = phaseOf(chunk, node.phase);
  const choice = chunk.choices?.[0];
  if (!choice) return Boolean(chunk.prompt_progress);
  if (choice.finish_reason) node.status = choice.finish_reason === "length" ? "length" : "done";
  const { reasoning_content: reasoning, content, tool_calls: calls } = choice.delta ?? {};
  if (!reasoning && !content && !calls?.length) return Boolean(choice.finish_reason);
  node.pieces += 1;
  const written = chunk.timings?.predicted_ms;
  if (reasoning) {
    node.thinkingSince ??= Date.now();
    node.thinkingFrom ??= written;
    node.reasoning += reasoning;
  }
  // Thinking lasts until the first piece of the answer.
  if (reasoning || (!node.content && !node.toolCalls && node.reasoning)) node.thinkMs = written - node.thinkingFrom;
  if (content) node.content += content;
  for (const call of calls ?? []) addCall((node.toolCalls ??= []), call);
  return true;
}

/** Adds a piece of a tool call to those of an answer. */
function addCall(calls, { index, id, function: { name, arguments: text } = {} }) {
  const call = (calls[index] ??= { id: "", name: "", arguments: "" });
  if (id) call.id = id;
  call.name += name ?? "";
  call.arguments += text ?? "";
}

/** Progress of a request before its first token, from a progress chunk. */
function phaseOf({ prompt_progress: progress, queue }, before) {
  const since = before?.since ?? Date.now();
  if (queue) return { kind: "queue", since, ahead: queue.position };
  return { kind: "reading", since, at: Date.now(), ...progress };
}
