// Chats as files: Markdown to read, JSON to read in again here or elsewhere.

import * as conversations from "./conversations.js";
import { h } from "./dom.js";
import { checkedSettings, isProfile } from "./profiles.js";
import { pretty } from "./tool-card.js";

const FORMAT = "dsv4.chat";
const VERSION = 1;
const ID = /^[A-Za-z0-9]+$/;
const ROLES = ["user", "assistant"];
const STATES = ["done", "stopped", "length", "error"];

/** The shown messages as Markdown. */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Chat"}`];
  for (const node of conversations.path(conversation)) {
    parts.push(node.role === "user" ? "## You" : `## ${node.model ?? "Answer"}`);
    if (node.reasoning?.trim()) parts.push(`<details><summary>Thoughts</summary>\n\n${node.reasoning.trim()}\n\n</details>`);
    for (const { name, text, pasted } of node.files ?? []) parts.push(pasted ? text : `*${name}*`);
    parts.push(node.content.trim());
    for (const call of node.toolCalls ?? []) parts.push(callAsMarkdown(call));
  }
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

function callAsMarkdown({ name, arguments: text, result }) {
  const fence = "`".repeat(Math.max(3, ...[...`${text}${result}`.matchAll(/`+/g)].map(([run]) => run.length + 1)));
  const block = (content) => `${fence}\n${pretty(content)}\n${fence}`;
  return [`Calls \`${name}\`:`, block(text), ...(result === undefined ? [] : ["Result:", block(result)])].join("\n\n");
}

/** The whole conversation, all versions of its messages, as JSON. */
export function asJson(conversation) {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversation }, null, 2);
}

/** Offers a text as a download. */
export function download(title, extension, text) {
  const name = `${title.replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || "chat"}.${extension}`;
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  const link = h("a", { href: url, download: name, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The conversation of a file that `asJson` gave, with an id of its own. Error with the reason for any other text. */
export function fromJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || file.version !== VERSION) throw new Error("The file holds no exported chat.");
  const { title, created, updated, nodes, picked, settings, profile } = file.conversation ?? {};
  const fresh = conversations.create();
  for (const [id, node] of Object.entries(nodes ?? {})) fresh.nodes[id] = checked(id, node, nodes);
  if (!Object.keys(fresh.nodes).length) throw new Error("The exported chat has no messages.");
  for (const [parent, id] of Object.entries(picked ?? {}))
    if (Object.hasOwn(fresh.nodes, id) && conversations.isUnder(fresh.nodes[id], parent)) fresh.picked[parent] = id;
  Object.assign(fresh, { title: String(title ?? ""), created: time(created), updated: time(updated) });
  if (settings && typeof settings === "object") fresh.settings = checkedSettings(settings);
  if (isProfile(profile)) fresh.profile = profile;
  return fresh;
}

function checked(id, node, nodes) {
  const isWhole = ID.test(id) && node?.id === id && ROLES.includes(node.role) && typeof node.content === "string";
  if (!isWhole) throw new Error(`Message ${id} of the file is damaged.`);
  const seen = new Set([id]);
  for (let parent = node.parent; parent !== null; parent = nodes[parent].parent) {
    if (seen.has(parent) || !Object.hasOwn(nodes, parent) || !nodes[parent])
      throw new Error(`Message ${id} of the file has no way to the first one.`);
    seen.add(parent);
  }
  const { parent, role, content } = node;
  if (role === "user") return { id, parent, role, content, ...filesOf(node) };
  const status = STATES.includes(node.status) ? node.status : "stopped";
  const { reasoning, model, error, officialCost } = node;
  const kept = { id, parent, role, content, status, reasoning: String(reasoning ?? ""), ...figuresOf(node) };
  if (model) kept.model = String(model);
  if (Number.isFinite(officialCost?.usd)) kept.officialCost = { model: String(officialCost.model), usd: officialCost.usd };
  if (Array.isArray(node.toolCalls) && node.toolCalls.length) kept.toolCalls = node.toolCalls.map(callOf);
  if (error) kept.error = { kind: "request", title: String(error.title), detail: String(error.detail) };
  return kept;
}

/** The figures of an answer that are numbers. */
function figuresOf({ thinkMs, tokens, usage, timings }) {
  const kept = Object.fromEntries(Object.entries({ thinkMs, tokens }).filter(([, value]) => Number.isFinite(value)));
  if (Number.isFinite(usage?.prompt_tokens) && Number.isFinite(usage.completion_tokens)) kept.usage = numbersOf(usage);
  if (timings) kept.timings = numbersOf(timings);
  return kept;
}

/** The numbers of an object and of those in it. */
function numbersOf(object) {
  const isObject = (value) => Object(value) === value;
  const parts = Object.entries(object).filter(([, value]) => Number.isFinite(value) || isObject(value));
  return Object.fromEntries(parts.map(([name, value]) => [name, isObject(value) ? numbersOf(value) : value]));
}

function callOf(call) {
  const { id, name, arguments: text, result } = call ?? {};
  return { id: String(id), name: String(name), arguments: String(text), ...(result === undefined ? {} : { result: String(result) }) };
}

function filesOf({ files }) {
  if (!Array.isArray(files) || !files.length) return {};
  const checked = (file) => ({ name: String(file?.name), text: String(file?.text), ...(file?.pasted ? { pasted: true } : {}) });
  return { files: files.map(checked) };
}

const time = (value) => (Number.isFinite(value) ? value : Date.now());
