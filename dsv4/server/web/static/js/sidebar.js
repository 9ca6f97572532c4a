// The sidebar: list of chats to open, rename, delete with undo; a drawer on small screens.

import { byId, h, icon, iconButton } from "./dom.js";
import { isComposing } from "./keys.js";
import { matching } from "./search.js";
import { load, save } from "./storage.js";

const DAY = 24 * 60 * 60 * 1000;
const PINNED = "Pinned";
const small = matchMedia("(max-width: 760px)");

/** `actions`: {open(id), rename(id, title), pin(id, on), remove(id), create()}. Returns {draw(entries, shown id), close()}. */
export function setupSidebar(actions) {
  const root = document.documentElement;
  const set = (open) => {
    root.dataset.sidebar = open ? "open" : "closed";
    byId("sidebar").inert = !open;
    if (!small.matches) save("sidebar", open);
  };
  const close = () => small.matches && set(false);
  const restore = () => set(!small.matches && load("sidebar", true));
  byId("sidebar-hide").append(icon("panel"));
  byId("sidebar-show").append(icon("menu"));
  byId("new-chat").append(icon("plus"), "New chat");
  byId("new-chat-small").append(icon("plus"));
  byId("sidebar-hide").addEventListener("click", () => set(false));
  byId("sidebar-show").addEventListener("click", () => set(true));
  byId("scrim").addEventListener("click", () => set(false));
  for (const id of ["new-chat", "new-chat-small"]) byId(id).addEventListener("click", actions.create);
  small.addEventListener("change", restore);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || isComposing(event)) return;
    const isDrawer = small.matches && root.dataset.sidebar === "open";
    if (isDrawer) set(false);
    if (isDrawer || event.target === search) event.preventDefault(); // not meant for the running answer
  });
  restore();
  const search = byId("search");
  let last = [[], null];
  const redraw = () => draw(matching(last[0], search.value), last[1], { ...actions, redraw }, search.value.trim());
  search.addEventListener("input", redraw);
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || isComposing(event) || !search.value) return;
    search.value = "";
    event.stopPropagation();
    redraw();
  });
  return { draw: (...shown) => redraw((last = shown)), close };
}

let drawn = ""; // what the list shows, as JSON

/** Draws the list, unless it shows this already or a title is being typed into it. */
function draw(entries, shown, actions, query) {
  if (byId("chats").querySelector("input")) return;
  const next = JSON.stringify([entries, shown, query, new Date().toDateString()]);
  if (next === drawn) return;
  drawn = next;
  keepingFocus(() => build(entries, shown, actions, query));
}

/** Runs `change`; the focus returns to the same button of the same chat. */
function keepingFocus(change) {
  const focused = document.activeElement;
  const item = focused?.closest("#chats .chat");
  const at = item && [...item.children].indexOf(focused);
  change();
  const row = item && byId("chats").querySelector(`[data-id="${item.dataset.id}"]`);
  // The other buttons are shown while one in their row has the focus.
  for (const i of [0, at]) row?.children[i]?.focus({ preventScroll: true });
}

function build(entries, shown, actions, query) {
  const groups = new Map();
  for (const entry of entries) {
    const name = entry.pinned ? PINNED : groupOf(entry.updated);
    groups.set(name, [...(groups.get(name) ?? []), entry]);
  }
  if (query && !entries.length) {
    byId("chats").replaceChildren(h("p", { class: "none-found", role: "status" }, "No chat has these words."));
    return;
  }
  const order = [...groups].sort(([a], [b]) => (b === PINNED) - (a === PINNED)); // the others stay in order
  byId("chats").replaceChildren(
    ...order.map(([name, members]) =>
      h(
        "section",
        {},
        h("h2", {}, name),
        h("ul", {}, ...members.map((entry) => row(entry, entry.id === shown, actions))),
      ),
    ),
  );
}

function row(entry, shown, actions) {
  const open = h(
    "button",
    {
      type: "button",
      class: "chat-open",
      title: entry.title,
      "aria-current": shown ? "page" : null,
      onclick: () => actions.open(entry.id),
      ondblclick: () => rename(item, entry, actions),
    },
    entry.title,
  );
  const edit = iconButton("edit", `Rename: ${entry.title}`, () => rename(item, entry, actions));
  const pinLabel = `${entry.pinned ? "Unpin" : "Pin"}: ${entry.title}`;
  const pressed = { "aria-pressed": String(Boolean(entry.pinned)) };
  const pin = iconButton("pin", pinLabel, () => actions.pin(entry.id, !entry.pinned), pressed);
  const remove = iconButton("trash", `Delete: ${entry.title}`, () => actions.remove(entry.id));
  const item = h("li", { class: shown ? "chat shown" : "chat", dataset: { id: entry.id } }, open, pin, edit, remove);
  return item;
}

function rename(item, entry, actions) {
  const input = h("input", { type: "text", "aria-label": "Chat title", maxlength: "120" });
  input.value = entry.title;
  let open = true;
  const finish = (keep) => {
    if (!open) return;
    open = false;
    drawn = "";
    keepingFocus(() => item.replaceChildren(...buttons));
    const title = input.value.trim();
    // The old title is not set again: another tab may have given a new one.
    if (keep && title && title !== entry.title) actions.rename(entry.id, title);
    else actions.redraw();
  };
  input.addEventListener("blur", () => finish(true));
  input.addEventListener("keydown", (event) => {
    const ends = (event.key === "Enter" || event.key === "Escape") && !isComposing(event);
    event.stopPropagation();
    if (!ends) return;
    event.preventDefault(); // Enter would press the button that gets the focus
    finish(event.key === "Enter");
  });
  const buttons = [...item.children];
  item.replaceChildren(input);
  input.select();
}

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 7 * DAY) return "Last 7 days";
  return new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}
