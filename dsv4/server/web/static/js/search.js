// Search of the stored chats, by title and by text.

import * as conversations from "./conversations.js";

const texts = new Map(); // conversation id -> {updated, text}

/** Entries of `list` that have every word of `query` in their title or messages. */
export function matching(list, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return list;
  return list.filter((entry) => {
    const text = textOf(entry);
    return words.every((word) => text.includes(word));
  });
}

function textOf({ id, title, updated }) {
  const known = texts.get(id);
  if (known?.updated === updated && known.title === title) return known.text;
  const nodes = Object.values(conversations.read(id)?.nodes ?? {});
  const pasted = nodes.flatMap((node) => (node.files ?? []).filter((file) => file.pasted).map((file) => file.text));
  const text = [title, ...pasted, ...nodes.map((node) => node.content ?? "")].join("\n").toLowerCase();
  texts.set(id, { updated, title, text });
  return text;
}
