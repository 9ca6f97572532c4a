// Banners about the server (above the thread) and toasts (short messages at the bottom).

import { byId, h, icon } from "./dom.js";
import { apiKey, setApiKey } from "./storage.js";

/** Shows {title, detail} and a button that calls `retry`. */
export function showBanner({ title, detail }, retry) {
  const button = h("button", { type: "button", class: "button quiet", onclick: retry }, "Try again");
  fill(icon("alert"), h("div", { class: "banner-text" }, h("strong", {}, title), " ", detail), button);
}

/** Asks for an API key; calls `entered` once it is given. */
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
  // The model list may be refused late: taking the focus then would put a message being typed into the key field.
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

/** Shows a toast with an optional action {label, run} for some seconds. */
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

/** Announces `text` to screen readers. */
export function announce(text) {
  byId("announce").textContent = text;
}
