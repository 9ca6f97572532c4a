// Conversations: trees of messages. Editing a question or asking again adds a sibling; `picked` selects the shown one.
//
// conversation  {id, title, created, updated, pinned, profile, settings, nodes: {id: node},
//               picked: {parent id or "": child id}, removed: [node id],
//               changed: {field: time of its last change, in ms}}
// node          {id, parent, role: "user", content, files: [{name, text, pasted}]}
//               {id, parent, role: "assistant", content, reasoning, status, model, thinkMs, usage, timings, tokens, error,
//               officialCost, toolCalls: [{id, name, arguments, result}]}; the answer after its tools' results is its child
//               before: {usage, timings, officialCost, tokens} from before it went on, while it is streaming
//               answerId: the server's id of the answer, for the inspector
//               saved: time of its last save or change by the tab that writes it, in ms
// status        "streaming" | "done" | "stopped" | "length" | "error"

import { withFiles } from "./attachments.js";
import { finish } from "./continuation.js";
import { load, save, watch } from "./storage.js";

const INDEX = "chats";
const NO_RESULT = "No result was given."; // of a call that the user went past with another message
export const SILENCE = 5000; // ms without a save after which the tab that wrote an answer counts as closed
const key = (id) => `chat.${id}`;
const known = new Set(); // ids of the conversations that this tab has read or stored, and may still hold
const deleted = new Set(); // ids of those that it must not store again

watch((name, isRemoved) => {
  if (name === "") known.forEach((id) => deleted.add(id));
  if (!name.startsWith(key(""))) return;
  if (isRemoved) deleted.add(name.slice(key("").length));
  else restore(name.slice(key("").length));
});

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

/** Marks a change of the message by this tab: later than the last one, also within one millisecond. */
export function touch(node) {
  node.saved = Math.max(Date.now(), (node.saved ?? 0) + 1);
}

/** True if another tab is still writing this answer; such a tab saves it every second. */
function isAlive(node) {
  return Date.now() - (node.saved ?? 0) < SILENCE;
}

/** The stored conversation, or null. An unfinished answer that no tab writes any more becomes "stopped". */
export function read(id) {
  const conversation = load(key(id), null);
  known.add(id);
  if (conversation) stopAbandoned(conversation);
  return conversation;
}

/** Stops the answers that no tab writes any more; returns them. */
export function stopAbandoned(conversation) {
  const isAbandoned = (node) => node.status === "streaming" && !isAlive(node);
  const nodes = Object.values(conversation.nodes).filter(isAbandoned);
  for (const node of nodes) {
    node.status = "stopped";
    finish(node);
  }
  return nodes;
}

/** Sets fields of the conversation: of a field that another tab has set too, the later value stays. */
export function change(conversation, fields) {
  const times = Object.keys(fields).map((name) => [name, Date.now()]);
  Object.assign(conversation, fields, { changed: { ...conversation.changed, ...Object.fromEntries(times) } });
}

/**
 * Stores the conversation and moves it to the top of the list; false if the browser refuses. Skips a deleted one. First
 * merges what other tabs have added to the stored copy.
 */
export function write(conversation) {
  if (deleted.has(conversation.id)) return true;
  merge(conversation);
  const { id, title, updated, pinned } = conversation;
  known.add(id);
  const others = list().filter((entry) => entry.id !== id);
  const entries = [{ id, title, updated, pinned }, ...others].sort((a, b) => b.updated - a.updated);
  return save(key(id), conversation) && save(INDEX, entries);
}

/** Takes over what other tabs have stored of the conversation, into its own messages. */
export function merge(conversation) {
  const stored = load(key(conversation.id), null);
  if (!stored) return;
  const { nodes, picked } = conversation;
  for (const [name, time] of Object.entries(stored.changed ?? {}))
    if (time > (conversation.changed?.[name] ?? 0)) {
      conversation[name] = stored[name];
      conversation.changed = { ...conversation.changed, [name]: time };
    }
  conversation.updated = Math.max(conversation.updated, stored.updated);
  for (const id of stored.removed ?? []) if (nodes[id] && !hasReplies(conversation, nodes[id])) drop(conversation, id);
  for (const node of Object.values(stored.nodes)) {
    const own = nodes[node.id];
    if (!own && !conversation.removed?.includes(node.id)) nodes[node.id] = node;
    if (!own || (node.saved ?? 0) <= (own.saved ?? 0)) continue;
    for (const name of Object.keys(own)) delete own[name];
    Object.assign(own, node);
  }
  // What is picked here stays picked, unless it is gone.
  const isGone = (parent) => !nodes[picked[parent]];
  for (const [parent, id] of Object.entries(stored.picked)) if (isGone(parent) && nodes[id]) picked[parent] = id;
}

/** Deletes the stored conversation; returns it for undo, which restores it. */
export function remove(id) {
  const conversation = read(id);
  deleted.add(id);
  save(
    INDEX,
    list().filter((entry) => entry.id !== id),
  );
  save(key(id), null);
  return conversation;
}

/** Lets the conversation be stored again after it was deleted. */
export function restore(id) {
  deleted.delete(id);
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

/** True if a message follows this one, picked or not. */
export function hasReplies(conversation, node) {
  return Object.values(conversation.nodes).some((other) => other.parent === node.id);
}

/** True if the message stands under the one with this id; "": if it is a first one. */
export function isUnder(node, parent) {
  return (node.parent ?? "") === parent;
}

/** Removes a message without replies; picks the sibling before it, if any. */
export function removeNode(conversation, node) {
  const rest = siblings(conversation, node).filter((other) => other.id !== node.id);
  drop(conversation, node.id);
  if (rest.length) pick(conversation, rest.at(-1));
  else delete conversation.picked[node.parent ?? ""];
}

function drop(conversation, id) {
  delete conversation.nodes[id];
  conversation.removed = [...(conversation.removed ?? []), id];
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
  const next = (id) => conversation.nodes[conversation.picked[id]];
  for (let id = ""; next(id) && isUnder(next(id), id); id = nodes.at(-1).id) nodes.push(next(id));
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
