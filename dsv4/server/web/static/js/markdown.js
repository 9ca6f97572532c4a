// Markdown of the model -> sanitised DOM. The model's own HTML is shown as text, never run.

import { Marked } from "../vendor/marked.js";
import "../vendor/purify.js";
import { codeBlock } from "./code.js";
import { mathExtensions, mathReady } from "./math.js";

const { DOMPurify } = globalThis;

const TAGS = [
  ...[
    "p",
    "br",
    "hr",
    "strong",
    "em",
    "del",
    "code",
    "pre",
    "blockquote",
    "a",
    "span",
    "div",
    "sub",
    "sup",
    "kbd",
    "u",
  ],
  ...["h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "input"],
  ...["table", "thead", "tbody", "tr", "th", "td"],
];
const ATTRIBUTES = [
  "href",
  "title",
  "align",
  "start",
  "type",
  "checked",
  "disabled",
  "class",
  "data-math",
  "data-display",
];
const PURIFY = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, RETURN_DOM_FRAGMENT: true };

// Tags without attributes that models use in prose and tables.
const HARMLESS = /^<\/?(?:br|sub|sup|kbd|u)\s*\/?>$/i;

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text, block }) {
      if (HARMLESS.test(text.trim())) return text;
      return block ? `<p>${escape(text.trim())}</p>` : escape(text);
    },
    // A picture would be fetched from a host that the model names: link to it instead.
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
  },
});
marked.use({ extensions: mathExtensions(escape) });

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A") {
    if (!/^(?:https?:|mailto:)/i.test(element.getAttribute("href") ?? "")) element.removeAttribute("href");
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
  if (element.tagName === "INPUT" && element.getAttribute("type") !== "checkbox") element.remove();
});

/** Keeps `element` showing a Markdown text that grows: only blocks whose source has changed are built again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.blocks = []; // {raw, node} for each child
    element.classList.add("markdown");
  }

  /** Shows `text`; `open` says that more is to come, so that unclosed emphasis is drawn closed for now. */
  show(text, open = false) {
    const tokens = marked
      .lexer(open ? closeMarks(text) : text)
      .filter((token) => token.type !== "space" && token.type !== "def");
    tokens.forEach((token, i) => {
      const old = this.blocks[i];
      if (old?.raw === token.raw && old.type === token.type) return;
      if (old?.type === "code" && token.type === "code" && old.node.sameLanguage(token.lang)) {
        old.node.setText(token.text);
        this.blocks[i] = { ...old, raw: token.raw };
        return;
      }
      const node = token.type === "code" ? codeBlock(token.text, token.lang) : block(token);
      if (old) old.node.replaceWith(node);
      else this.element.append(node);
      this.blocks[i] = { type: token.type, raw: token.raw, node };
    });
    for (const extra of this.blocks.splice(tokens.length)) extra.node.remove();
  }
}

/** One top-level Markdown token -> element. */
function block(token) {
  const element = document.createElement("div");
  element.className = "block";
  element.append(DOMPurify.sanitize(marked.parser([token]), PURIFY));
  for (const pre of element.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const language = /language-(\S+)/.exec(code?.className ?? "")?.[1];
    pre.replaceWith(codeBlock(pre.textContent.replace(/\n$/, ""), language));
  }
  for (const table of element.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table-frame";
    table.replaceWith(frame);
    frame.append(table);
  }
  mathReady(element);
  return element;
}

/** Closes emphasis and code spans that the last paragraph leaves open, and drops a marker that has only begun. */
export function closeMarks(text) {
  if ((text.match(/^ {0,3}(?:```|~~~)/gm) ?? []).length > 0 && fenceOpenOrLast(text)) return text;
  const cut = text.lastIndexOf("\n\n") + 1;
  let tail = text.slice(cut).replace(/(?:\*{1,3}|_{1,2}|`+|~{1,2})$/, "");
  if ((tail.match(/`/g) ?? []).length % 2) return `${text.slice(0, cut)}${tail}\``;
  const prose = tail.replace(/`[^`]*`/g, "");
  if ((prose.match(/\*\*/g) ?? []).length % 2) tail = `${tail.trimEnd()}**`;
  return text.slice(0, cut) + tail;
}

/** Does the text end inside a fenced block, or on the fence that closes one? */
function fenceOpenOrLast(text) {
  const fences = [...text.matchAll(/^ {0,3}(?:```|~~~).*$/gm)];
  return fences.length % 2 === 1 || fences.at(-1).index + fences.at(-1)[0].length === text.trimEnd().length;
}
