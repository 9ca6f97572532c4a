// The page's colours: the system's, or those chosen by the button. A "colours" event on the document tells of a change.

import { byId, icon } from "./dom.js";
import { load, save } from "./storage.js";

const systemDark = matchMedia("(prefers-color-scheme: dark)");

/** True while the page is dark. */
export function isDark() {
  return (load("theme", null) ?? (systemDark.matches ? "dark" : "light")) === "dark";
}

/** Wires up the button. */
export function setupColours() {
  const button = byId("theme");
  const draw = () => {
    const theme = load("theme", null);
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    const label = isDark() ? "Switch to light colours" : "Switch to dark colours";
    button.setAttribute("aria-label", label);
    button.title = label;
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
    document.dispatchEvent(new Event("colours"));
  };
  button.addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    // Choosing the system's own theme means to follow the system again.
    save("theme", next === (systemDark.matches ? "dark" : "light") ? null : next);
    draw();
  });
  systemDark.addEventListener("change", draw);
  draw();
}
