// Answers: who may request one, its request, and its storage while it grows.

import { toast } from "./banner.js";
import { finish } from "./continuation.js";
import * as conversations from "./conversations.js";
import { generate, isRunning } from "./generation.js";
import { profileName, settingsFields, settingsOf, thinkingFields } from "./profiles.js";

const SAVE_EVERY = 1000; // ms, while an answer streams

const live = new Map(); // id -> conversation with an answer in progress; its stored copy lags behind

/** The conversation with this id if an answer to it is in progress. */
export const liveOne = (id) => live.get(id);

/** Stores the conversation; false, with a toast unless `isTold`, if the browser refuses. */
export function store(conversation, isTold = false) {
  const isStored = conversations.write(conversation);
  if (!isStored && !isTold) toast("The browser's storage is full: delete chats to keep new ones.");
  return isStored;
}

/**
 * `page`: {model() -> promise of a name; begun, changed and ended (conversation, node), called as an answer goes}.
 * Returns what requests answers: each returns false, with a toast, while an answer to the conversation is in progress.
 */
export function setupAnswers(page) {
  const unlessRunning = (run) => (conversation, ...given) => {
    if (isRunning(conversation)) {
      toast("An answer is being written: stop it, or wait for its end.");
      return false;
    }
    run(conversation, ...given);
    return true;
  };

  /** Requests an answer under `question`: a message of the user, or an answer whose tool calls have results. */
  const answer = (conversation, question) => {
    conversations.change(conversation, { profile: profileName() });
    const messages = conversations.toMessages(conversation, question, settingsOf(conversation).system);
    const node = conversations.addNode(conversation, question, { role: "assistant", status: "streaming" });
    write(conversation, node, { messages, ...thinkingFields() });
  };

  /** Adds the user's message under `parent` and requests an answer. */
  const ask = (conversation, parent, content, files) => {
    const fields = { role: "user", content, ...(files?.length ? { files } : {}) };
    answer(conversation, conversations.addNode(conversation, parent, fields));
  };

  /** Continues an answer that was cut off, from where it ends. */
  const goOn = (conversation, node) => {
    const question = conversation.nodes[node.parent];
    const messages = conversations.toMessages(conversation, question, settingsOf(conversation).system);
    const { content, reasoning } = node;
    messages.push({ role: "assistant", content, prefix: true, ...(reasoning ? { reasoning_content: reasoning } : {}) });
    write(conversation, node, { messages, ...(reasoning ? {} : { thinking: { type: "disabled" } }) });
  };

  /** Retries after a failure; a failed answer without text is dropped, unless messages follow it. */
  const retry = (conversation, node) => {
    const isEmpty = !node.content && !node.reasoning;
    if (isEmpty && !conversations.hasReplies(conversation, node)) conversations.removeNode(conversation, node);
    answer(conversation, conversation.nodes[node.parent]);
  };

  /** Gives the tool calls of an answer their results and requests the answer after them. */
  const sendResults = (conversation, node, results) => {
    node.toolCalls.forEach((call, i) => (call.result = results[i]));
    conversations.touch(node);
    page.changed(conversation, node);
    answer(conversation, node);
  };

  /** Requests the answer `node` and stores it as it grows. */
  const write = async (conversation, node, fields) => {
    const settings = { ...fields, ...settingsFields(conversation) };
    const body = async () => ({ model: (node.model = await page.model()), ...settings });
    let isTold = false; // once per answer: later toasts would hide others
    const keep = () => {
      conversations.touch(node);
      if (!store(conversation, isTold)) isTold = true;
    };
    const done = generate(conversation, node, body, () => {
      page.changed(conversation, node);
      if (Date.now() - node.saved >= SAVE_EVERY) keep();
    });
    live.set(conversation.id, conversation);
    conversations.restore(conversation.id);
    keep();
    page.begun(conversation, node);
    await done;
    live.delete(conversation.id);
    keep();
    page.ended(conversation, node);
  };

  return Object.fromEntries(
    Object.entries({ answer, ask, goOn, retry, sendResults }).map(([name, run]) => [name, unlessRunning(run)]),
  );
}

addEventListener("pagehide", () => {
  for (const conversation of live.values()) {
    // The answer ends here: a tab that opens the chat next must not wait for more.
    for (const node of Object.values(conversation.nodes))
      if (node.status === "streaming" && isRunning(conversation)) {
        node.status = "stopped";
        conversations.touch(node);
        finish(node);
      }
    conversations.write(conversation);
  }
});
