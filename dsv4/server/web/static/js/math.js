// TeX in $...$, $$...$$, \(...\) and \[...\] -> MathML. The library is loaded with the first formula.

import "../vendor/purify.js";

// A $ opens a formula only before a non-space and closes it only after a non-space and not before a digit, so that
// prices stay text.
const INLINE = /^(?:\\\(([\s\S]+?)\\\)|\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d))/;
const DISPLAY = /^(?:\\\[([\s\S]+?)\\\]|\$\$([\s\S]+?)\$\$)/;
const START = /\\\(|\\\[|\$/;

const LONGEST = 4_000; // longest formula that is typeset, in characters
const DEEPEST = 40; // nested braces and \\left

let library = null;

/** Extensions for marked; formulas become placeholders that hold their source, see `mathReady`. */
export function mathExtensions(escape) {
  const placeholder = (tag, token) =>
    `<${tag} class="math" data-math="${escape(token.tex)}" data-display="${token.display ? 1 : 0}">${escape(token.raw.trim())}</${tag}>`;
  const tokenizer = (name, pattern, display) => (src) => {
    const match = pattern.exec(src);
    return match ? { type: name, raw: match[0], tex: match[1] ?? match[2], display } : undefined;
  };
  const start = (src) => {
    const index = src.search(START);
    return index < 0 ? undefined : index;
  };
  return [
    {
      name: "mathBlock",
      level: "block",
      start: (src) => src.match(/^[ \t]*(?:\\\[|\$\$)/m)?.index,
      tokenizer: tokenizer("mathBlock", new RegExp(`^[ \\t]*(?:${DISPLAY.source.slice(1)})[ \\t]*(?:\\n|$)`), true),
      renderer: (token) => placeholder("div", token),
    },
    {
      name: "mathInlineDisplay",
      level: "inline",
      start,
      tokenizer: tokenizer("mathInlineDisplay", DISPLAY, true),
      renderer: (token) => placeholder("span", token),
    },
    {
      name: "mathInline",
      level: "inline",
      start,
      tokenizer: tokenizer("mathInline", INLINE, false),
      renderer: (token) => placeholder("span", token),
    },
  ];
}

/** Typesets the placeholders in `element`; their source stays until the library is loaded, and on a TeX error. */
export function mathReady(element) {
  const spots = element.querySelectorAll(".math");
  if (!spots.length) return;
  if (library) {
    spots.forEach(typeset);
    return;
  }
  import("../vendor/temml.js").then((module) => {
    library = module.default;
    spots.forEach(typeset);
  });
}

function typeset(spot) {
  if (isTooMuch(spot.dataset.math)) return;
  try {
    let mathml = library.renderToString(spot.dataset.math, {
      displayMode: spot.dataset.display === "1",
      throwOnError: true,
      trust: false,
      strict: false,
      maxExpand: 200,
    });
    // The page's Content-Security-Policy forbids style attributes; the parser would report each one.
    mathml = mathml.replace(/ style="([^"]*)"/g, (_, style) => (style.includes("border:") ? ' class="boxed"' : ""));
    const options = { USE_PROFILES: { mathMl: true }, FORBID_ATTR: ["style", "href"], RETURN_DOM_FRAGMENT: true };
    spot.replaceChildren(globalThis.DOMPurify.sanitize(mathml, options));
  } catch {
    // Invalid TeX: its source stays.
  }
}

/** True if typesetting would take very long, or nest elements deeper than browsers can lay out. */
function isTooMuch(tex) {
  if (tex.length > LONGEST) return true;
  let depth = 0;
  for (const [mark] of tex.matchAll(/\\(?:left|right|begin|end)(?![a-zA-Z])|\\.|[{}]/g)) {
    if (mark === "{" || mark === "\\left" || mark === "\\begin") depth += 1;
    if (mark === "}" || mark === "\\right" || mark === "\\end") depth -= 1;
    if (depth > DEEPEST) return true;
  }
  return false;
}
