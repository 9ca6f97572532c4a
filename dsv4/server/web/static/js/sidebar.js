// The sidebar: list of chats to open, rename, delete with undo; a drawer on small screens.

import { byId, h, icon, iconButton } from "./dom.js";
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
  document.addEventListener("keydown", (event) => event.key === "Escape" && small.matches && set(false));
  restore();
  const search = byId("search");
  let last = [[], null];
  const redraw = () => draw(matching(last[0], search.value), last[1], actions, search.value.trim());
  search.addEventListener("input", redraw);
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !search.value) return;
    search.value = "";
    event.stopPropagation();
    redraw();
  });
  return { draw: (...shown) => redraw((last = shown)), close };
}

function draw(entries, shown, actions, query) {
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
  const pin = iconButton("pin", pinLabel, () => actions.pin(entry.id, !entry.pinned), { "aria-pressed": Boolean(entry.pinned) });
  const remove = iconButton("trash", `Delete: ${entry.title}`, () => actions.remove(entry.id));
  const item = h("li", { class: shown ? "chat shown" : "chat" }, open, pin, edit, remove);
  return item;
}

function rename(item, entry, actions) {
  const input = h("input", { type: "text", "aria-label": "Chat title", maxlength: "120" });
  input.value = entry.title;
  let open = true;
  const finish = (keep) => {
    if (!open) return;
    open = false;
    actions.rename(entry.id, keep && input.value.trim() ? input.value.trim() : entry.title);
  };
  input.addEventListener("blur", () => finish(true));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") finish(event.key === "Enter");
    event.stopPropagation();
  });
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
