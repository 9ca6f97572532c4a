// Text files beside a message: picked or dropped, shown as chips that unfold, sent as text before the question.

import { toast } from "./banner.js";
import { h, icon, iconButton } from "./dom.js";
import { bytes } from "./figures.js";

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

/** A message with its files, as the model reads it: the published template of DeepSeek's own service. */
export function withFiles(content, files = []) {
  const parts = files.map(
    ({ name, text }) => `[file name]: ${name}\n[file content begin]\n${text}\n[file content end]\n`,
  );
  return parts.join("") + content;
}

/** Chips of a sent message's files; each opens its text. */
export function fileList(files) {
  const chip = ({ name, text }) => {
    const body = h("pre", { tabindex: "0" });
    const ontoggle = () => (body.textContent = details.open ? text : ""); // only an open one is laid out
    const summary = h("summary", {}, icon("file"), h("span", {}, name), h("small", {}, bytes(text.length)));
    const details = h("details", { class: "file", ontoggle }, summary, body);
    return details;
  };
  return h("div", { class: "files", role: "group", "aria-label": "Attached files" }, ...files.map(chip));
}

/** The files that the next message takes along, as chips in `place`. `changed` is called after each change. */
export function setupAttachments(place, changed) {
  let files = [];
  const draw = () => {
    place.hidden = !files.length;
    place.replaceChildren(
      ...files.map((file) =>
        h(
          "span",
          { class: "file" },
          icon("file"),
          h("span", {}, file.name),
          h("small", {}, bytes(file.text.length)),
          iconButton("close", `Remove ${file.name}`, () => set(files.filter((other) => other !== file))),
        ),
      ),
    );
    changed();
  };
  const set = (next) => {
    files = next;
    draw();
  };
  const add = async (chosen) => {
    for (const file of chosen) {
      try {
        set([...files, await readText(file)]);
      } catch (error) {
        toast(error.message);
      }
    }
  };
  return {
    add,
    any: () => files.length > 0,
    /** The files, which are no longer attached then. */
    take: () => {
      const taken = files;
      set([]);
      return taken;
    },
  };
}
