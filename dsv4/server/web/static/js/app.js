// The page: selects the shown conversation and implements the buttons' actions.

import { describe, listModels, throwIfStopped } from "./api.js";
import { announce, askKey, hideBanner, showBanner, toast } from "./banner.js";
import { setupColours } from "./colours.js";
import { setupComposer } from "./composer.js";
import * as conversations from "./conversations.js";
import { generate, isRunning, stop } from "./generation.js";
import { byId } from "./dom.js";
import { closeInspector, openInspector, setupInspector } from "./inspector.js";
import { drawMeter } from "./meter.js";
import { chosenModel, setupModels, showModels } from "./models.js";
import { chooseProfile, profileName, settingsFields, settingsOf, setupProfiles, thinkingFields } from "./profiles.js";
import { offerKey, setupSettings } from "./settings.js";
import { setupShare } from "./share.js";
import { setupSidebar } from "./sidebar.js";
import { load, save } from "./storage.js";
import { Thread } from "./thread.js";

const SAVE_EVERY = 1000; // ms, while an answer streams
const ASK_AGAIN = 4000; // ms, while the server is unreachable

const live = new Map(); // id -> conversation with an answer in progress; its stored copy lags behind
let current = conversations.create();
const contexts = new Map(); // model -> tokens
let listing; // promise of the latest list of models
let nextTry = 0; // timer
let nextLook = 0; // timer

const thread = new Thread({
  again: (node) => answer(current, current.nodes[node.parent]),
  retry: (node) => retry(current, node),
  fresh: () => open(null),
  goOn: (node) => goOn(current, node),
  editQuestion: (node) => thread.views.get(conversations.questionOf(current, node).id)?.edit(),
  sendResults,
  inspect: (node) => openInspector(node.answerId),
  edit: (node, text) => ask(text, node.files, current.nodes[node.parent] ?? null),
  pick: (node) => {
    conversations.pick(current, node);
    store(current);
    show(false);
  },
});
const composer = setupComposer({
  send: (text, files) => ask(text, files, conversations.path(current).at(-1) ?? null),
  stop: () => stop(current),
});
const sidebar = setupSidebar({ open, create: () => open(null), rename, pin, remove });
const share = setupShare({ current: () => current, add });

/** Shows the conversation with this id; null: a new one. */
function open(id) {
  closeInspector();
  current = live.get(id) ?? (id && conversations.read(id)) ?? conversations.create();
  chooseProfile(current.profile);
  show();
  sidebar.close();
  composer.focus();
}

function show(following = true) {
  save("shown", current.id);
  thread.show(current, following);
  refresh();
  clearTimeout(nextLook);
  const elsewhere = (node) => node.status === "streaming" && !live.has(current.id);
  if (conversations.path(current).some(elsewhere)) nextLook = setTimeout(reread, conversations.SILENCE);
}

/** Updates the shown conversation with changes stored by another tab. */
function reread() {
  if (live.has(current.id)) return;
  const stored = conversations.read(current.id);
  if (!stored) return;
  // Versions picked in this tab stay picked, unless they are gone.
  for (const [parent, id] of Object.entries(current.picked)) if (id in stored.nodes) stored.picked[parent] = id;
  current = stored;
  show(thread.following);
}

function refresh() {
  composer.setRunning(isRunning(current));
  sidebar.draw(conversations.list(), current.id);
  drawMeter(conversations.path(current), contexts.get(chosenModel()));
  share.refresh();
  byId("heading").textContent = current.title;
  byId("heading").hidden = !current.title;
  document.title = current.title ? `${current.title} - dsv4` : "dsv4";
}

function store(conversation) {
  if (!conversations.write(conversation)) toast("The browser's storage is full: delete chats to keep new ones.");
}

/** Gives the tool calls of an answer their results and requests the answer after them. */
function sendResults(node, results) {
  if (isRunning(current)) return;
  node.toolCalls.forEach((call, i) => (call.result = results[i]));
  answer(current, node);
}

/** Adds the user's message under `parent` and requests an answer. */
function ask(text, files, parent) {
  if (isRunning(current)) return;
  answer(current, conversations.addNode(current, parent, { role: "user", content: text, ...(files?.length ? { files } : {}) }));
}

/** Requests an answer under `question`: a message of the user, or an answer whose tool calls have results. */
async function answer(conversation, question) {
  if (isRunning(conversation)) return;
  conversation.profile = profileName();
  const messages = conversations.toMessages(conversation, question, settingsOf(conversation).system);
  const node = conversations.addNode(conversation, question, { role: "assistant", status: "streaming" });
  await write(conversation, node, { messages, ...thinkingFields() });
}

/** Continues an answer that was cut off, from where it ends. */
async function goOn(conversation, node) {
  if (isRunning(conversation)) return;
  const question = conversation.nodes[node.parent];
  const messages = conversations.toMessages(conversation, question, settingsOf(conversation).system);
  const { content, reasoning } = node;
  messages.push({ role: "assistant", content, prefix: true, ...(reasoning ? { reasoning_content: reasoning } : {}) });
  await write(conversation, node, { messages, ...(reasoning ? {} : { thinking: { type: "disabled" } }) });
}

/** Requests the answer `node` and stores it as it grows. */
async function write(conversation, node, fields) {
  const settings = { ...fields, ...settingsFields(conversation) };
  const body = async () => ({ model: (node.model = await modelName()), ...settings });
  let saved = (node.saved = Date.now());
  const isKept = () => conversations.list().some((entry) => entry.id === conversation.id); // not deleted meanwhile
  const done = generate(conversation, node, body, () => {
    if (conversation === current) thread.changed(node);
    if (Date.now() - saved < SAVE_EVERY || !isKept()) return;
    saved = node.saved = Date.now();
    store(conversation);
  });
  live.set(conversation.id, conversation);
  store(conversation);
  if (conversation === current) show();
  await done;
  live.delete(conversation.id);
  node.saved = Date.now();
  if (isKept()) store(conversation);
  refresh();
  announce(node.status === "error" ? node.error.title : "The answer is complete.");
  if (node.error?.kind === "key") needKey();
  if (node.error?.kind === "failed") connect();
}

/** Retries after a failure; a failed answer without text is dropped. */
function retry(conversation, node) {
  if (!node.content && !node.reasoning) conversations.removeNode(conversation, node);
  answer(conversation, conversation.nodes[node.parent]);
}

function rename(id, title) {
  change(id, { title });
}

function pin(id, pinned) {
  change(id, { pinned });
}

function change(id, fields) {
  const conversation = Object.assign(
    live.get(id) ?? (id === current.id ? current : conversations.read(id)),
    fields,
  );
  store(conversation);
  refresh();
}

/** Stores an imported conversation and shows it. */
function add(conversation) {
  store(conversation);
  open(conversation.id);
}

function remove(id) {
  if (live.has(id)) stop(live.get(id));
  const conversation = live.get(id) ?? conversations.read(id);
  conversations.remove(id);
  if (id === current.id) open(null);
  else refresh();
  const undo = () => {
    store(conversation);
    open(id);
  };
  toast("Chat deleted.", { label: "Undo", run: undo });
}

function needKey() {
  offerKey();
  askKey(async () => {
    // Check the key with the model list before the question: a late refusal could come after the next key.
    if (!(await connect())) return;
    const last = conversations.path(current).at(-1);
    const refused = Object.values(current.nodes).filter((node) => node !== last && node.error?.kind === "key");
    for (const node of refused) {
      delete node.error;
      node.status = "stopped";
      thread.changed(node);
    }
    if (refused.length) store(current);
    if (last?.error?.kind === "key") retry(current, last);
  });
}

/** The chosen model. Before the model list has arrived, waits for it, and requests it again if it failed. */
async function modelName() {
  await listing;
  if (!chosenModel()) await connect();
  return chosenModel();
}

/** Requests the model list -> true if it arrived; while the server is unreachable, shows a banner and polls. */
function connect() {
  listing = list();
  return listing;
}

async function list() {
  clearTimeout(nextTry);
  let error;
  try {
    const models = await listModels();
    for (const { id, context } of models) contexts.set(id, context);
    showModels(models.map((model) => model.id));
    drawMeter(conversations.path(current), contexts.get(chosenModel()));
    await throwIfStopped();
    hideBanner();
    return true;
  } catch (caught) {
    error = describe(caught);
  }
  if (error.kind === "key") {
    needKey();
    return false;
  }
  showBanner(error, connect);
  nextTry = setTimeout(connect, ASK_AGAIN);
  return false;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop(current);
});
addEventListener("pagehide", () => {
  for (const conversation of live.values()) {
    // The answer ends here: a tab that opens the chat next must not wait for more.
    for (const node of Object.values(conversation.nodes))
      if (node.status === "streaming" && isRunning(conversation))
        Object.assign(node, { status: "stopped", saved: Date.now() });
    conversations.write(conversation);
  }
});
// Another tab has changed the list or the shown chat.
addEventListener("storage", (event) => {
  if (event.key?.endsWith(`chat.${current.id}`)) reread();
  refresh();
});

setupSettings({
  current: () => current,
  keep: (settings) => {
    current.settings = settings;
    if (Object.keys(current.nodes).length) store(current);
  },
  keyChanged: connect,
});
setupInspector();
setupColours();
setupProfiles(byId("profiles"));
setupModels(refresh);
open(load("shown", null));
connect();
