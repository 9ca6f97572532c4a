// The page's colours: the system's, or those chosen by the button.

import { load } from "./storage.js";

export const systemDark = matchMedia("(prefers-color-scheme: dark)");

/** True while the page is dark. */
export function isDark() {
  return (load("theme", null) ?? (systemDark.matches ? "dark" : "light")) === "dark";
}
