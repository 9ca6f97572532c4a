// Pager through the versions of a message: "2 / 3" with arrows.

import { h, iconButton } from "./dom.js";

/** Pager of a message. Its `show(versions)` tells it their number, and hides it for a single one. */
export function pager(node, actions) {
  const element = h("span", { class: "pager", role: "group", "aria-label": "Versions" });
  let shown = "";
  element.show = (versions) => {
    const ids = versions.map((version) => version.id);
    if (shown === ids.join()) return;
    shown = ids.join();
    element.hidden = ids.length < 2;
    const at = ids.indexOf(node.id);
    const step = (by) => () => actions.pick(versions[at + by]);
    element.replaceChildren(
      iconButton("left", "Previous version", step(-1), { disabled: at === 0 }),
      h("span", {}, `${at + 1} / ${ids.length}`),
      iconButton("right", "Next version", step(1), { disabled: at === ids.length - 1 }),
    );
  };
  return element;
}
