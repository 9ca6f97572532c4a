// The model's Markdown -> sanitized DOM. HTML in it is shown as text, never interpreted.

import { Lexer, Marked } from "../vendor/marked.js";
import "../vendor/purify.js";
import { BlockSplitter } from "./blocks.js";
import { codeBlock } from "./code.js";
import { h } from "./dom.js";
import { footnoteExtensions } from "./footnotes.js";
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

/** A long run without a line break opportunity: its layout in browsers is quadratic in its length. */
export const UNBROKEN = /\S{400}/;

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text, block }) {
      if (HARMLESS.test(text.trim())) return text;
      return block ? `<p>${escape(text.trim())}</p>` : escape(text);
    },
    // An image would be fetched from a host of the model's choice: show a link instead.
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
  },
});
marked.use({ extensions: [...mathExtensions(escape), ...footnoteExtensions(escape)] });

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A") {
    if (!/^(?:https?:|mailto:)/i.test(element.getAttribute("href") ?? "")) element.removeAttribute("href");
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
  if (element.tagName !== "INPUT") return;
  if (element.getAttribute("type") !== "checkbox") element.remove();
  else element.setAttribute("aria-label", element.hasAttribute("checked") ? "Done" : "Open");
});

const LINKS = 1000; // most reference links per text: each block scans all of them

const REASONS = {
  deep: "Shown as plain text: it is nested too deeply to format.",
  long: "Shown as plain text: it is too long to format.",
  failed: "Shown as plain text: it could not be formatted.",
};

/** View of a growing Markdown text in `element`: only blocks whose source has changed are rebuilt. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.splitter = new BlockSplitter();
    this.blocks = []; // {kind, source, node} per child
    this.links = {}; // reference links defined in the text
    element.classList.add("markdown");
  }

  /** Shows `text`; `open`: more will follow, so unclosed emphasis is drawn closed for now. */
  show(text, open = false) {
    const { kept, blocks } = this.splitter.push(text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text);
    blocks.forEach((block, i) => {
      const closed = open && i === blocks.length - 1 && block.kind === "markdown";
      this.place(kept + i, closed ? { ...block, source: closeMarks(block.source) } : block);
    });
    for (const extra of this.blocks.splice(kept + blocks.length)) extra.node.remove();
    blocks.forEach((block, i) => block.closed && this.blocks[kept + i].node.complete?.());
    if (open) return;
    if (Object.keys(this.links).length) this.relink();
    for (const figure of this.element.querySelectorAll("figure.diagram")) figure.complete();
  }

  place(at, { kind, source, info, reason, goesOn }) {
    const old = this.blocks[at];
    if (old?.kind === kind && old.source === source && old.info === info) return;
    if (kind === "code" && old?.kind === kind && old.node.sameLanguage(info)) {
      old.node.setText(source);
      this.blocks[at] = { ...old, source, info };
      return;
    }
    if (kind === "plain" && old?.kind === kind && source.startsWith(old.source)) {
      old.node.querySelector(".plain").append(source.slice(old.source.length));
      this.blocks[at] = { ...old, source };
      return;
    }
    const node =
      kind === "code" ? codeBlock(source, info) : kind === "plain" ? plain(source, reason) : this.build(source);
    node.classList.toggle("continued", Boolean(this.blocks[at - 1]?.goesOn));
    if (old) old.node.replaceWith(node);
    else this.element.append(node);
    this.blocks[at] = { kind, source, info, goesOn, node };
  }

  /** One block -> element; plain text if formatting fails, so that no output of the model is lost. */
  build(source) {
    try {
      return block(source, this.links);
    } catch {
      return plain(source, "failed");
    }
  }

  /** Rebuilds blocks that may use links defined after them. */
  relink() {
    for (const block of this.blocks) {
      if (block.kind !== "markdown" || !block.source.includes("[")) continue;
      const node = this.build(block.source);
      node.className = block.node.className;
      block.node.replaceWith(node);
      block.node = node;
    }
    this.links = {};
  }
}

/** A block's source -> element; link definitions found in it are added to `links`. */
function block(source, links) {
  const lexer = new Lexer(marked.defaults);
  Object.assign(lexer.tokens.links, links);
  const tokens = lexer.lex(source);
  if (Object.keys(lexer.tokens.links).length <= LINKS) Object.assign(links, lexer.tokens.links);
  const element = document.createElement("div");
  element.className = UNBROKEN.test(source) ? "block unbroken" : "block";
  element.dir = "auto"; // by its first letter that has a direction
  element.append(DOMPurify.sanitize(marked.parser(tokens), PURIFY));
  for (const part of element.querySelectorAll("code, .math")) part.dir = "ltr";
  element.hidden = tokens.every((token) => token.type === "space" || token.type === "def");
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

function plain(source, reason) {
  const text = h("div", { class: UNBROKEN.test(source) ? "plain unbroken" : "plain", dir: "auto" }, source);
  return h("div", { class: "block" }, text, h("p", { class: "plain-note" }, REASONS[reason]));
}

/** Closes emphasis and code spans left open in the last paragraph, and drops an incomplete marker at its end. */
export function closeMarks(text) {
  if ((text.match(/^ {0,3}(?:```|~~~)/gm) ?? []).length > 0 && fenceOpenOrLast(text)) return text;
  const cut = text.lastIndexOf("\n\n") + 1;
  let tail = text.slice(cut).replace(/(?:\*{1,3}|_{1,2}|`+|~{1,2})$/, "");
  if ((tail.match(/`/g) ?? []).length % 2) return `${text.slice(0, cut)}${tail}\``;
  const prose = tail.replace(/`[^`]*`/g, "");
  if ((prose.match(/\*\*/g) ?? []).length % 2) tail = `${tail.trimEnd()}**`;
  return text.slice(0, cut) + tail;
}

/** True if the text ends inside a fenced block or with its closing fence. */
function fenceOpenOrLast(text) {
  const fences = [...text.matchAll(/^ {0,3}(?:```|~~~).*$/gm)];
  return fences.length % 2 === 1 || fences.at(-1).index + fences.at(-1)[0].length === text.trimEnd().length;
}
