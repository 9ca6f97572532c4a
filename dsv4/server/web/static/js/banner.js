// Messages about the server as a whole (above the thread) and short ones at the foot (toasts).

import { byId, h, icon } from "./dom.js";
import { apiKey, setApiKey } from "./storage.js";

/** Shows {title, detail} with a button that calls `retry`. */
export function showBanner({ title, detail }, retry) {
  const button = h("button", { type: "button", class: "button quiet", onclick: retry }, "Try again");
  fill(icon("alert"), h("div", { class: "banner-text" }, h("strong", {}, title), " ", detail), button);
}

/** Asks for an API key; `entered` is called when one was given. */
export function askKey(entered) {
  const input = h("input", {
    type: "password",
    "aria-label": "API key",
    placeholder: "API key",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
  });
  const refused = Boolean(apiKey());
  const onsubmit = (event) => {
    event.preventDefault();
    setApiKey(input.value.trim());
    hideBanner();
    entered();
  };
  const text = refused ? "The server did not accept this API key." : "This server asks for an API key.";
  fill(
    icon("alert"),
    h("div", { class: "banner-text" }, h("strong", {}, text)),
    h("form", { onsubmit }, input, h("button", { type: "submit", class: "button" }, "Continue")),
  );
  // A list of models refused late must not turn the rest of a message being written into a password.
  if (!document.activeElement?.value) input.focus();
}

export function hideBanner() {
  byId("banner").hidden = true;
}

function fill(...children) {
  byId("banner").replaceChildren(...children);
  byId("banner").hidden = false;
}

let toastTimer = 0;

/** Shows a short message with an optional action {label, run} for some seconds. */
export function toast(text, action = null) {
  const place = byId("toast");
  const hide = () => (place.hidden = true);
  const run = () => {
    hide();
    action.run();
  };
  place.replaceChildren(
    h("span", {}, text),
    ...(action ? [h("button", { type: "button", onclick: run }, action.label)] : []),
  );
  place.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, 6000);
}

/** Says `text` to screen readers. */
export function announce(text) {
  byId("announce").textContent = text;
}
