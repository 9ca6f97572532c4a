// Code blocks: a bar with the language and a copy button; highlighting for known languages.

import highlight from "../vendor/highlight.js";
import "../vendor/purify.js";
import { addDiagram } from "./diagram-block.js";
import { copyFrom, h, icon } from "./dom.js";

const FILES = [
  "python",
  "javascript",
  "typescript",
  "json",
  "bash",
  "c",
  "cpp",
  "rust",
  "go",
  "java",
  "sql",
  "xml",
  "css",
  "yaml",
  "diff",
];
const ALIASES = {
  py: "python",
  python3: "python",
  js: "javascript",
  jsx: "javascript",
  ts: "typescript",
  tsx: "typescript",
  sh: "bash",
  shell: "bash",
  zsh: "bash",
  console: "bash",
  "c++": "cpp",
  cc: "cpp",
  h: "c",
  rs: "rust",
  golang: "go",
  html: "xml",
  svg: "xml",
  yml: "yaml",
  patch: "diff",
  jsonl: "json",
};
const HIGHLIGHTED = 40_000; // characters; longer code is not highlighted
const loading = new Map(); // language -> promise

highlight.configure({ ignoreUnescapedHTML: true });

/**
 * A code block; `setText` replaces its text in place, valid while `sameLanguage(info)` is true. A diagram has
 * `complete` too, which draws it.
 */
export function codeBlock(text, info) {
  const name = nameOf(info);
  const code = h("code");
  const button = h(
    "button",
    {
      type: "button",
      class: "code-copy",
      "aria-label": "Copy code",
      onclick: () => copyFrom(button, code.textContent),
    },
    icon("copy"),
    "Copy",
  );
  const figure = h(
    "figure",
    { class: "code", dir: "ltr" },
    h("figcaption", {}, h("span", {}, name || "text"), button),
    h("pre", { tabindex: "0" }, code),
  );
  figure.setText = (next) => {
    // A block that has only grown keeps its existing nodes.
    if (code.lastChild?.nodeType === 3 && code.childNodes.length === 1 && next.startsWith(code.lastChild.data))
      code.lastChild.appendData(next.slice(code.lastChild.data.length));
    else code.textContent = next;
    paint(code, name);
  };
  figure.sameLanguage = (other) => nameOf(other) === name;
  figure.setText(text);
  if (name === "mermaid") addDiagram(figure, () => code.textContent);
  return figure;
}

function nameOf(info) {
  return (info ?? "")
    .trim()
    .split(/[\s{,:]/)[0]
    .toLowerCase();
}

function paint(code, name) {
  const language = ALIASES[name] ?? name;
  if (!FILES.includes(language) || code.textContent.length > HIGHLIGHTED) return;
  if (!highlight.getLanguage(language)) {
    if (!loading.has(language))
      loading.set(
        language,
        import(`../vendor/languages/${language}.js`).then((module) =>
          highlight.registerLanguage(language, module.default),
        ),
      );
    loading.get(language).then(() => paint(code, name));
    return;
  }
  try {
    const html = highlight.highlight(code.textContent, { language, ignoreIllegals: true }).value;
    const allowed = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };
    code.replaceChildren(globalThis.DOMPurify.sanitize(html, allowed));
  } catch {
    // Nested too deeply for the highlighter: the code stays unhighlighted.
  }
}
