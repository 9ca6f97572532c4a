// Pager through the versions of a message: "2 / 3" with arrows.

import { h, iconButton } from "./dom.js";

/** Pager through `versions`; null for a single version. */
export function pager(node, versions, actions) {
  if (versions.length < 2) return null;
  const at = versions.findIndex((other) => other.id === node.id);
  const step = (by) => () => actions.pick(versions[at + by]);
  return h(
    "span",
    { class: "pager", role: "group", "aria-label": "Versions" },
    iconButton("left", "Previous version", step(-1), { disabled: at === 0 }),
    h("span", {}, `${at + 1} / ${versions.length}`),
    iconButton("right", "Next version", step(1), { disabled: at === versions.length - 1 }),
  );
}
