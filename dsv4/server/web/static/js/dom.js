// Helpers to build elements without HTML strings.

/** The element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A new element. `props`: "on..." listeners, "class", "dataset" entries, else attributes; null and false are left out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7.5h16M4 16.5h11",
  panel:
    "M6.5 4.5h11a2.5 2.5 0 0 1 2.5 2.5v10a2.5 2.5 0 0 1-2.5 2.5h-11a2.5 2.5 0 0 1-2.5-2.5V7a2.5 2.5 0 0 1 2.5-2.5zM9.5 4.5v15",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M18.7 5.3l-1.4 1.4M6.7 17.3l-1.4 1.4",
  moon: "M19.8 14.2A8 8 0 1 1 9.8 4.2a6.5 6.5 0 0 0 10 10z",
  sliders:
    "M4 7.5h8.5M17.5 7.5H20M12.5 7.5a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0M4 16.5h2.5M11.5 16.5H20M6.5 16.5a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0",
  send: "M12 19V5.5M6 11.5l6-6 6 6",
  stop: "M8.5 7h7a1.5 1.5 0 0 1 1.5 1.5v7a1.5 1.5 0 0 1-1.5 1.5h-7a1.5 1.5 0 0 1-1.5-1.5v-7a1.5 1.5 0 0 1 1.5-1.5z",
  copy: "M10.5 8.5h8a1.5 1.5 0 0 1 1.5 1.5v8.5a1.5 1.5 0 0 1-1.5 1.5h-8a1.5 1.5 0 0 1-1.5-1.5V10a1.5 1.5 0 0 1 1.5-1.5zM15.5 5.5a1.5 1.5 0 0 0-1.5-1.5H5.5A1.5 1.5 0 0 0 4 5.5V14a1.5 1.5 0 0 0 1.5 1.5",
  check: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19.5 12a7.5 7.5 0 1 1-2.3-5.4L19.5 9M19.5 4.5V9H15",
  edit: "M4.5 19.5l.9-3.9L15.9 5.1a1.4 1.4 0 0 1 2 0l1 1a1.4 1.4 0 0 1 0 2L8.4 18.6z",
  trash: "M5 7h14M9.5 7V4.5h5V7M7 7l.8 12.5h8.4L17 7M10.5 10.5v5.5M13.5 10.5v5.5",
  right: "M9.5 6.5l5.5 5.5-5.5 5.5",
  left: "M14.5 6.5L9 12l5.5 5.5",
  down: "M12 5v13.5M6 12.5l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  think: "M12 3.5a6 6 0 0 0-3.5 10.9c.6.5 1 1.2 1 2v.6h5v-.6c0-.8.4-1.5 1-2A6 6 0 0 0 12 3.5zM10 20.5h4",
  tool:
    "M14.6 5.2a4.2 4.2 0 0 1 4.9-.9l-2.8 2.8.2 2 2 .2 2.8-2.8a4.2 4.2 0 0 1-5.8 5.1L8.3 19a2 2 0 0 1-2.9-2.9l7.4-7.5a4.2 4.2 0 0 1 1.8-3.4z",
  inspect: "M10.5 4.5a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM15 15l4.5 4.5",
  pin: "M9 4h6l-.8 6 3.3 3.5h-11L9.8 10zM12 13.5V20",
  share: "M12 14.5V4M8 7.5L12 3.5l4 4M5 12.5v6a1.5 1.5 0 0 0 1.5 1.5h11a1.5 1.5 0 0 0 1.5-1.5v-6",
  clip: "M19 11.5l-7 7a4.6 4.6 0 0 1-6.5-6.5L13 4.5a3 3 0 0 1 4.3 4.3l-7.4 7.4a1.5 1.5 0 0 1-2.1-2.1l6.8-6.8",
  file: "M13.5 3.5H7A1.5 1.5 0 0 0 5.5 5v14A1.5 1.5 0 0 0 7 20.5h10a1.5 1.5 0 0 0 1.5-1.5V8.5zM13.5 3.5v5h5",
  alert: "M12 8.5v4.5M12 16.2v.1M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17z",
};

/** A decorative line icon; the button around it has the label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon", `icon-${name}`);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon and no visible text. */
export function iconButton(name, label, onclick, props = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props },
    icon(name),
  );
}

/** Copies text and briefly shows a tick on the button. */
export async function copyFrom(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No clipboard API (plain http from another machine): fall back to execCommand.
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const old = button.querySelector(".icon");
  if (old.classList.contains("icon-check")) return;
  const tick = icon("check");
  old.replaceWith(tick);
  setTimeout(() => tick.replaceWith(old), 1400);
}
