// Long texts that a reader did not write word by word: shown folded, with a button that opens them.

import { h } from "./dom.js";

const LINES = 20;
const CHARACTERS = 2000;
const SHOWN_LINES = 8;
const SHOWN_CHARACTERS = 600;

/** {lines, isLong} of a text. */
export function measure(text) {
  let lines = 1;
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) lines += 1;
  return { lines, isLong: lines > LINES || text.length > CHARACTERS };
}

/** What is shown of a folded text: its first lines. */
export function beginning(text) {
  return text.split("\n", SHOWN_LINES).join("\n").slice(0, SHOWN_CHARACTERS).trimEnd();
}

/** A button for a folded text; `toggle(open)` is called with what the reader wants. Its `draw(open, text)` labels it. */
export function foldButton(controls, toggle) {
  const onclick = () => toggle(button.getAttribute("aria-expanded") !== "true");
  const button = h("button", { type: "button", class: "fold", "aria-controls": controls, onclick });
  button.draw = (open, text) => {
    const { lines } = measure(text);
    const size =
      lines > LINES ? `${lines.toLocaleString("en")} lines` : `${text.length.toLocaleString("en")} characters`;
    button.setAttribute("aria-expanded", open);
    button.textContent = open ? "Show less" : `Show all (${size})`;
  };
  return button;
}
