// TeX between $...$, $$...$$, \(...\) and \[...\] -> MathML. The library is fetched when the first formula appears.

import "../vendor/purify.js";

// A $ opens mathematics only before a non-space and closes it after one, not before a digit: prices stay prices.
const INLINE = /^(?:\\\(([\s\S]+?)\\\)|\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d))/;
const DISPLAY = /^(?:\\\[([\s\S]+?)\\\]|\$\$([\s\S]+?)\$\$)/;
const START = /\\\(|\\\[|\$/;

let library = null;

/** Extensions for marked; formulas come out as placeholders that hold their source, see `mathReady`. */
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

/** Typesets the placeholders inside `element`; until the library has come, and on a TeX error, the source stays. */
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
  let mathml;
  try {
    mathml = library.renderToString(spot.dataset.math, {
      displayMode: spot.dataset.display === "1",
      throwOnError: true,
      trust: false,
      strict: false,
      maxExpand: 200,
    });
  } catch {
    return; // not TeX after all
  }
  // The page's content policy forbids style attributes; the parser would report each of them.
  mathml = mathml.replace(/ style="([^"]*)"/g, (_, style) => (style.includes("border:") ? ' class="boxed"' : ""));
  const options = { USE_PROFILES: { mathMl: true }, FORBID_ATTR: ["style", "href"], RETURN_DOM_FRAGMENT: true };
  spot.replaceChildren(globalThis.DOMPurify.sanitize(mathml, options));
}
