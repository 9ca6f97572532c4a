// Rows of the inspector: one per layer, with attention shares and the experts; and the likeliest next tokens.

import { h } from "./dom.js";
import { count } from "./figures.js";
import { drawable, shares } from "./trace.js";

const SVG = "http://www.w3.org/2000/svg";
const LISTED = 8; // most entries listed in an open row
const EXCERPT = 90; // characters of an entry's text
const NAMES = { swa: "window only", csa: "compressed by 4, chosen by the indexer", hca: "compressed by 128" };
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

/** A row per layer of the trace. `paint(layer or null)` colours the text while the reader points at a row. */
export function layerRows(answer, trace, paint) {
  let pinned = null;
  return trace.layers.map((layer, index) => {
    const detail = h("div", { class: "layer-detail", id: `layer-${index}`, hidden: true });
    const toggle = () => {
      const open = pinned !== layer;
      for (const other of document.querySelectorAll(".layer-row[aria-expanded=true]")) close(other);
      pinned = open ? layer : null;
      button.setAttribute("aria-expanded", open);
      detail.hidden = !open;
      if (open) detail.replaceChildren(...details(answer, layer));
      paint(pinned);
    };
    const button = h(
      "button",
      {
        type: "button",
        class: "layer-row",
        "aria-expanded": "false",
        "aria-controls": detail.id,
        "aria-label": describe(answer, layer, index),
        onclick: toggle,
        onpointerenter: () => paint(layer),
        onfocus: () => paint(layer),
        onpointerleave: () => paint(pinned),
        onblur: () => paint(pinned),
      },
      h("span", { class: "layer-number" }, String(index)),
      h("span", { class: `layer-kind ${layer.kind}` }, layer.kind.toUpperCase()),
      shareBar(layer),
      h("span", { class: "layer-counts" }, countsOf(layer)),
      expertStrip(answer.num_experts, layer),
    );
    return h("div", { class: "layer" }, button, detail);
  });
}

function close(row) {
  row.setAttribute("aria-expanded", "false");
  row.nextElementSibling.hidden = true;
}

function countsOf({ window, entries, num_visible: visible, kind }) {
  if (kind === "swa" || !visible) return count(window.length);
  const read = entries.index.length;
  return `${count(window.length)} + ${count(read)}${read < visible ? `/${count(visible)}` : ""}`;
}

function describe(answer, layer, index) {
  const { window, entries, sink } = shares(layer);
  const attention = `window ${percent(window)}, entries ${percent(entries)}, sink ${percent(sink)}`;
  return `Layer ${index}, ${NAMES[layer.kind]}: ${attention}; experts ${layer.experts.join(", ")}`;
}

function shareBar(layer) {
  const parts = Object.entries(shares(layer)).map(([name, share]) => {
    const part = h("i", { class: `share ${name}`, title: `${name} ${percent(share)}` });
    part.style.flexGrow = share;
    return part;
  });
  return h("span", { class: "shares" }, ...parts);
}

/** All experts of a layer as a line, those that ran as marks: the darker, the more weight. */
function expertStrip(total, { experts, expert_weights: weights }) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${total} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("experts");
  const most = Math.max(...weights);
  experts.forEach((expert, i) => {
    const mark = document.createElementNS(SVG, "rect");
    const wide = Math.max(1, total / 80);
    for (const [name, value] of Object.entries({ x: expert, y: 0, width: wide, height: 1 }))
      mark.setAttribute(name, value);
    mark.setAttribute("fill-opacity", 0.35 + 0.65 * (weights[i] / most));
    svg.append(mark);
  });
  return svg;
}

function details(answer, layer) {
  const { experts, expert_weights: weights, hashed } = layer;
  const ran = experts.map((expert, i) => `${expert} (${weights[i].toFixed(2)})`).join(", ");
  const how = hashed ? "by token id" : "by score";
  const { window, entries, sink } = shares(layer);
  return [
    h("p", {}, `Window ${percent(window)}, entries ${percent(entries)}, sink ${percent(sink)}`),
    h("p", {}, `Experts ${how}: ${ran}, and the shared one`),
    ...(layer.entries.index.length ? [entryList(answer, layer.entries)] : []),
  ];
}

/** The entries with the most weight. */
function entryList({ pieces }, { index, start, stop, weight, score }) {
  const order = index.map((_, i) => i).sort((a, b) => weight[b] - weight[a]);
  const row = (i) => {
    const text = drawable(pieces.slice(start[i], stop[i]).join("")).replace(/\s+/g, " ").trim();
    const shown = text.length > EXCERPT ? `${text.slice(0, EXCERPT)}…` : text;
    return h(
      "tr",
      {},
      h("td", {}, String(index[i])),
      h("td", {}, `${count(start[i])}–${count(stop[i] - 1)}`),
      h("td", {}, percent(weight[i])),
      h("td", {}, score[i] === null ? "" : score[i].toFixed(2)),
      h("td", { class: "excerpt" }, shown),
    );
  };
  const head = ["Entry", "Tokens", "Weight", "Score", "Text"].map((name) => h("th", { scope: "col" }, name));
  const rest = order.length > LISTED ? h("p", {}, `and ${count(order.length - LISTED)} more`) : null;
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...order.slice(0, LISTED).map(row)));
  return h("div", { class: "entry-list" }, table, rest);
}

/** The likeliest next tokens; `written`: text of the one that was chosen. */
export function nextTokens({ next_tokens: tokens }, written) {
  return tokens.map(({ text, probability }) => {
    const bar = h("i", {});
    bar.style.width = `${(100 * probability).toFixed(1)}%`;
    return h(
      "li",
      { class: text === written ? "taken" : null, title: text === written ? "The chosen token" : null },
      h("span", { class: "next-text" }, drawable(text).replace(/\n/g, "⏎") || "·"),
      h("span", { class: "next-bar" }, bar),
      h("span", {}, percent(probability)),
    );
  });
}
