// View of one user message, editable in place.

import { fileList } from "./attachments.js";
import { copyFrom, h, iconButton } from "./dom.js";
import { beginning, foldButton, measure } from "./fold.js";
import { isComposing } from "./keys.js";
import { UNBROKEN } from "./markdown.js";
import { pager } from "./pager.js";

/** `actions`: {edit(node, text) -> false if it is refused, pick(node)}. */
export class QuestionView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    const text = h(
      "div",
      { class: UNBROKEN.test(node.content) ? "unbroken" : null, id: `text-${node.id}`, dir: "auto" },
      ...withCode(node.content),
    );
    this.bubble = h("div", { class: "bubble" }, text);
    if (measure(node.content).isLong) this.fold(text);
    const copy = iconButton("copy", "Copy message", () => copyFrom(copy, node.content));
    this.pager = pager(node, actions);
    this.foot = h(
      "footer",
      {},
      this.pager,
      copy,
      iconButton("edit", "Edit message", () => this.edit()),
    );
    this.bubble.hidden = !node.content;
    const files = node.files?.length ? fileList(node.files) : null;
    this.element = h("article", { class: "message user", "aria-label": "Your message" }, files, this.bubble, this.foot);
  }

  /** Shows the first lines of a long `text`, and a button for the rest. */
  fold(text) {
    const { content } = this.node;
    const toggle = (open) => {
      // Only the shown part is laid out: a message may hold a megabyte.
      text.replaceChildren(...withCode(open ? content : beginning(content)));
      text.classList.toggle("cut", !open);
      button.draw(open, content);
    };
    const button = foldButton(text.id, toggle);
    toggle(false);
    this.bubble.append(button);
  }

  edit() {
    const area = h("textarea", { "aria-label": "Edit message", rows: "3", dir: "auto" });
    area.value = this.node.content;
    const close = () => {
      form.replaceWith(this.bubble);
      this.foot.hidden = false;
    };
    const send = () => {
      const text = area.value.trim();
      const isNew = text && text !== this.node.content;
      if (!isNew || this.actions.edit(this.node, text)) close();
    };
    const cancel = h("button", { type: "button", class: "button quiet", onclick: close }, "Cancel");
    const submit = h("button", { type: "submit", class: "button" }, "Send");
    const onsubmit = (event) => {
      event.preventDefault();
      send();
    };
    const onkeydown = (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey) onsubmit(event);
      else return;
      event.stopPropagation();
    };
    const form = h(
      "form",
      { class: "edit", onsubmit, onkeydown },
      area,
      h("div", { class: "edit-row" }, cancel, submit),
    );
    this.bubble.replaceWith(form);
    this.foot.hidden = true;
    area.focus();
  }

  update() {}

  tick() {}
}

/** The children of a message: fenced code as blocks, all else as it was typed. */
function withCode(text) {
  const children = [];
  let plain = [];
  let fence = null; // its first line and those below it
  for (const line of text.split("\n")) {
    if (fence && /^\s*```\s*$/.test(line)) {
      if (plain.length) children.push(plain.join("\n"));
      children.push(h("pre", { dir: "ltr" }, h("code", {}, fence.slice(1).join("\n"))));
      [plain, fence] = [[], null];
    } else if (fence) fence.push(line);
    else if (/^\s*```[^`]*$/.test(line)) fence = [line];
    else plain.push(line);
  }
  if (fence) plain = plain.concat(fence); // never closed
  return plain.length ? [...children, plain.join("\n")] : children;
}
