// The page: selects the shown conversation and connects the parts to each other.

import { liveOne, setupAnswers, store } from "./answers.js";
import { noticeOf } from "./answer.js";
import { announce, toast } from "./banner.js";
import { setupColours } from "./colours.js";
import { setupComposer } from "./composer.js";
import { setupConnection } from "./connection.js";
import * as conversations from "./conversations.js";
import { isRunning, stop } from "./generation.js";
import { byId } from "./dom.js";
import { closeInspector, openInspector, setupInspector } from "./inspector.js";
import { isComposing } from "./keys.js";
import { drawMeter } from "./meter.js";
import { setupModels } from "./models.js";
import { chooseProfile, setupProfiles } from "./profiles.js";
import { setupSettings } from "./settings.js";
import { setupShare } from "./share.js";
import { setupSidebar } from "./sidebar.js";
import { load, save, watch } from "./storage.js";
import { Thread } from "./thread.js";

let current = conversations.create();
let nextLook = 0; // timer

const connection = setupConnection({ listed: meter, accepted: askRefused });
const answers = setupAnswers({
  model: connection.model,
  begun: (conversation, node) => {
    changed(conversation, node);
    if (conversation === current) show();
  },
  changed,
  ended,
});
const thread = new Thread({
  again: (node) => answers.answer(current, current.nodes[node.parent]),
  retry: (node) => answers.retry(current, node),
  fresh: () => open(null),
  goOn: (node) => answers.goOn(current, node),
  editQuestion: (node) => thread.views.get(conversations.questionOf(current, node).id)?.edit(),
  sendResults: (node, results) => answers.sendResults(current, node, results),
  inspect: (node) => openInspector(node.answerId),
  edit: (node, text) => answers.ask(current, current.nodes[node.parent] ?? null, text, node.files),
  pick: (node) => {
    conversations.pick(current, node);
    store(current);
    show(false);
  },
});
const composer = setupComposer({
  send: (text, files) => answers.ask(current, conversations.path(current).at(-1) ?? null, text, files),
  stop: () => stop(current),
  shown: () => current.id,
});
const sidebar = setupSidebar({
  open,
  create: () => open(null),
  rename: (id, title) => change(id, { title }),
  pin: (id, pinned) => change(id, { pinned }),
  remove,
});
const share = setupShare({ current: () => current, add });

/** Shows the conversation with this id; null: a new one. */
function open(id) {
  closeInspector();
  current = liveOne(id) ?? (id && conversations.read(id)) ?? conversations.create();
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
  const elsewhere = (node) => node.status === "streaming" && !liveOne(current.id);
  if (conversations.path(current).some(elsewhere)) nextLook = setTimeout(reread, conversations.SILENCE);
}

/** Updates the shown conversation with changes stored by another tab. */
function reread() {
  conversations.merge(current);
  if (!liveOne(current.id)) conversations.stopAbandoned(current).forEach((node) => thread.changed(node));
  show(thread.following);
}

function refresh() {
  composer.setRunning(isRunning(current));
  sidebar.draw(conversations.list(), current.id);
  meter();
  share.refresh();
  byId("heading").textContent = current.title;
  byId("heading").hidden = !current.title;
  document.title = current.title ? `${current.title} - dsv4` : "dsv4";
}

function meter() {
  drawMeter(conversations.path(current), connection.context());
}

function changed(conversation, node) {
  if (conversation === current) thread.changed(node);
}

function ended(conversation, node) {
  refresh();
  if (conversation === current) announce(node.error?.title ?? (noticeOf(node) || "The answer is complete."));
  const { kind } = node.error ?? {};
  if (kind === "key") connection.needKey();
  // The server may have been restarted, with another model.
  if (["offline", "broken", "request", "failed"].includes(kind)) connection.connect();
}

/** After a key was accepted: asks the last question again if its answer was refused, and removes the other refusals. */
function askRefused() {
  const last = conversations.path(current).at(-1);
  const refused = Object.values(current.nodes).filter((node) => node !== last && node.error?.kind === "key");
  for (const node of refused) {
    delete node.error;
    node.status = "stopped";
    conversations.touch(node);
    thread.changed(node);
  }
  if (refused.length) store(current);
  if (last?.error?.kind === "key") answers.retry(current, last);
}

/** Changes fields of a conversation, if it has not been deleted meanwhile. */
function change(id, fields) {
  const conversation = liveOne(id) ?? (id === current.id ? current : conversations.read(id));
  if (conversation) {
    conversations.change(conversation, fields);
    store(conversation);
  }
  refresh();
}

/** Stores an imported conversation and shows it. */
function add(conversation) {
  store(conversation);
  open(conversation.id);
}

function remove(id) {
  const running = liveOne(id);
  if (running) stop(running);
  const stored = conversations.remove(id);
  if (id === current.id) open(null);
  else refresh();
  const undo = () => {
    conversations.restore(id);
    store(running ?? stored);
    open(id);
  };
  toast("Chat deleted.", { label: "Undo", run: undo });
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || isComposing(event)) return;
  if (!document.querySelector("dialog[open], :popover-open")) stop(current);
});
// Another tab has changed the list or the shown chat.
watch((name) => {
  if (name.endsWith(`chat.${current.id}`)) reread();
  else refresh();
});

setupSettings({
  current: () => current,
  keep: (settings) => {
    conversations.change(current, { settings });
    if (Object.keys(current.nodes).length) store(current);
  },
  keyChanged: connection.connect,
});
setupInspector();
setupColours();
setupProfiles(byId("profiles"));
setupModels(refresh);
open(load("shown", null));
connection.connect();
