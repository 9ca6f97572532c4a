// Conversations: trees of messages. Editing a question or asking again adds a sibling; `picked` selects the shown one.
//
// conversation  {id, title, created, updated, pinned, profile, settings, nodes: {id: node},
//               picked: {parent id or "": child id}}
// node          {id, parent, role: "user", content, files: [{name, text, pasted}]}
//               {id, parent, role: "assistant", content, reasoning, status, model, thinkMs, usage, timings, tokens, error,
//               officialCost, toolCalls: [{id, name, arguments, result}]}; the answer after its tools' results is its child
//               answerId: the server's id of the answer, for the inspector
//               saved: time of the last save by the tab that writes it, in ms
// status        "streaming" | "done" | "stopped" | "length" | "error"

import { withFiles } from "./attachments.js";
import { load, save } from "./storage.js";

const INDEX = "chats";
const NO_RESULT = "No result was given."; // of a call that the user went past with another message
export const SILENCE = 5000; // ms without a save after which the tab that wrote an answer counts as closed
const key = (id) => `chat.${id}`;

// getRandomValues, unlike randomUUID, also exists on plain http.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Short entries {id, title, updated, pinned} of all stored conversations, newest first. */
export function list() {
  return load(INDEX, []);
}

/** An empty conversation; it is stored once it holds a message. */
export function create() {
  return { id: newId(), title: "", created: Date.now(), updated: Date.now(), nodes: {}, picked: {} };
}

/** True if another tab is still writing this answer; such a tab saves it every second. */
function isAlive(node) {
  return Date.now() - (node.saved ?? 0) < SILENCE;
}

/** The stored conversation, or null. An unfinished answer that no tab writes any more becomes "stopped". */
export function read(id) {
  const conversation = load(key(id), null);
  if (!conversation) return null;
  for (const node of Object.values(conversation.nodes)) {
    if (node.status === "streaming" && !isAlive(node)) node.status = "stopped";
  }
  return conversation;
}

/**
 * Stores the conversation and moves it to the top of the list; false if the browser refuses.
 * First merges what other tabs have added to the stored copy.
 */
export function write(conversation) {
  merge(conversation, load(key(conversation.id), null));
  const { id, title, updated, pinned } = conversation;
  const others = list().filter((entry) => entry.id !== id);
  const entries = [{ id, title, updated, pinned }, ...others].sort((a, b) => b.updated - a.updated);
  return save(key(id), conversation) && save(INDEX, entries);
}

function merge(conversation, stored) {
  for (const node of Object.values(stored?.nodes ?? {})) {
    const own = conversation.nodes[node.id];
    if (own) {
      if ((node.saved ?? 0) > (own.saved ?? 0)) Object.assign(own, node);
    } else if (!conversation.removed?.includes(node.id)) {
      conversation.nodes[node.id] = node;
      conversation.picked[node.parent ?? ""] ??= node.id;
    }
  }
}

/** Deletes the stored conversation; returns it for undo. */
export function remove(id) {
  const conversation = read(id);
  save(
    INDEX,
    list().filter((entry) => entry.id !== id),
  );
  save(key(id), null);
  return conversation;
}

/** Adds a message under `parent` (null: the first message) and picks it. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent: parent?.id ?? null, ...fields };
  conversation.nodes[node.id] = node;
  pick(conversation, node);
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content || titleOfFile(node.files[0]));
  return node;
}

/** Removes a message without replies; picks the sibling before it, if any. */
export function removeNode(conversation, node) {
  const rest = siblings(conversation, node).filter((other) => other.id !== node.id);
  delete conversation.nodes[node.id];
  conversation.removed = [...(conversation.removed ?? []), node.id];
  if (rest.length) pick(conversation, rest.at(-1));
  else delete conversation.picked[node.parent ?? ""];
}

/** Picks `node` among its siblings. */
export function pick(conversation, node) {
  conversation.picked[node.parent ?? ""] = node.id;
}

/** All versions of a message (itself included), oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/** The shown messages, first to last. */
export function path(conversation) {
  const nodes = [];
  for (let id = conversation.picked[""]; id; id = conversation.picked[id]) {
    const node = conversation.nodes[id];
    if (!node) break;
    nodes.push(node);
  }
  return nodes;
}

/** The user's message that an answer belongs to. */
export function questionOf(conversation, node) {
  while (node.role !== "user") node = conversation.nodes[node.parent];
  return node;
}

/** Messages for the API, up to and including `leaf`. Answers without text and tool calls are left out. */
export function toMessages(conversation, leaf, system) {
  const messages = [];
  for (let node = leaf; node; node = conversation.nodes[node.parent]) {
    if (node.toolCalls && node.status === "done") messages.unshift(...callMessages(node));
    else if (node.role === "user" || node.content)
      messages.unshift({ role: node.role, content: withFiles(node.content, node.files) });
  }
  if (system.trim()) messages.unshift({ role: "system", content: system });
  return messages;
}

/** An answer that calls tools, and their results. */
function callMessages({ content, reasoning, toolCalls }) {
  const calls = toolCalls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  const thoughts = reasoning ? { reasoning_content: reasoning } : {};
  const results = toolCalls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result ?? NO_RESULT }));
  return [{ role: "assistant", content, ...thoughts, tool_calls: calls }, ...results];
}

const titleOfFile = ({ name, text, pasted }) => (pasted ? text.trim().slice(0, 200) : name);

function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 60).trimEnd()}…` : line;
}
