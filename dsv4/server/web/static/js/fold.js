// Folding of long texts, as pasted ones: the first lines are shown, with a button to open the rest.

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

/** The shown part of a folded text: its first lines. */
export function beginning(text) {
  return text.split("\n", SHOWN_LINES).join("\n").slice(0, SHOWN_CHARACTERS).trimEnd();
}

/** A button for a folded text; calls `toggle(open)` with the wanted state. Its `draw(open, text)` sets the label. */
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
