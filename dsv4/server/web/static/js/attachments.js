// Texts beside a message: files, picked or dropped, and long pastes. They are chips that unfold, sent before the question.
//
// file  {name, text, pasted: true of a paste}

import { toast } from "./banner.js";
import { h, icon, iconButton } from "./dom.js";
import { bytes, count } from "./figures.js";
import { measure } from "./fold.js";

const LARGEST = 2_000_000; // bytes; a browser's storage holds about five million characters

/** {name, text} of a file; Error with the reason where it cannot be sent as text. */
export async function readText(file) {
  if (file.size > LARGEST) throw new Error(`${file.name} has ${bytes(file.size)}; up to ${bytes(LARGEST)} can be attached.`);
  const data = new Uint8Array(await file.arrayBuffer());
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(data);
    if (text.includes("\0")) throw new TypeError();
    return { name: file.name, text };
  } catch {
    throw new Error(`${file.name} is no text in UTF-8.`);
  }
}

/**
 * A message with its files, as the model reads it: the published template of DeepSeek's own service. A paste stands as it
 * is, an empty line before what follows.
 */
export function withFiles(content, files = []) {
  const parts = files.map(({ name, text, pasted }) =>
    pasted ? `${text}\n\n` : `[file name]: ${name}\n[file content begin]\n${text}\n[file content end]\n`,
  );
  const whole = parts.join("") + content;
  return !content && files.at(-1)?.pasted ? whole.slice(0, -2) : whole;
}

/** A chip that opens the text of a file. */
function chip({ name, text, pasted }) {
  const body = h("pre", { tabindex: "0" });
  const ontoggle = () => (body.textContent = details.open ? text : ""); // only an open one is laid out
  const { lines } = measure(text);
  const size = pasted && lines > 1 ? `${count(lines)} lines` : bytes(text.length);
  const summary = h("summary", {}, icon("file"), h("span", {}, name), h("small", {}, size));
  const details = h("details", { class: "file", ontoggle }, summary, body);
  return details;
}

/** Chips of a sent message's files; each opens its text. */
export function fileList(files) {
  return h("div", { class: "files", role: "group", "aria-label": "Attached files" }, ...files.map(chip));
}

/**
 * The files that the next message takes along, as chips in `place`. `changed` is called after each change, `insert(text)`
 * for a paste that is to stand in the message after all.
 */
export function setupAttachments(place, changed, insert) {
  let files = [];
  const draw = () => {
    place.hidden = !files.length;
    place.replaceChildren(
      ...files.map((file) =>
        h(
          "span",
          { class: "attachment" },
          chip(file),
          file.pasted ? iconButton("edit", "Put the pasted text into the message", () => putBack(file)) : null,
          iconButton("close", `Remove ${file.name}`, () => remove(file)),
        ),
      ),
    );
    changed();
  };
  const remove = (file) => set(files.filter((other) => other !== file));
  const putBack = (file) => {
    remove(file);
    insert(file.text);
  };
  const set = (next) => {
    files = next;
    draw();
  };
  let reading = Promise.resolve();
  const add = (chosen) => (reading = reading.then(() => read(chosen)));
  const read = async (chosen) => {
    for (const file of chosen) {
      try {
        const taken = await readText(file);
        set([...files, taken]);
      } catch (error) {
        toast(error.message);
      }
    }
  };
  return {
    add,
    /** A pasted text. */
    paste: (text) => set([...files, { name: "Pasted text", text, pasted: true }]),
    any: () => files.length > 0,
    /** Waits for the files that are still being read. */
    settled: () => reading,
    /** The files, which are no longer attached then. */
    take: () => {
      const taken = files;
      set([]);
      return taken;
    },
  };
}
