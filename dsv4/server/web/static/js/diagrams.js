// Draws Mermaid texts in a sandboxed frame (diagram-frame.js). Frame and library are loaded with the first diagram.

import { h } from "./dom.js";

const PATIENCE = 20_000; // ms for a diagram, the loading of the library included

let frame = null; // the frame in use
let ready = null; // promise: it can draw
let isReady = null; // resolves it
let lastId = 0;
const waiting = new Map(); // id -> function that takes the frame's reply

addEventListener("message", ({ data, source }) => {
  if (!frame || source !== frame.contentWindow) return;
  if (data.ready) isReady();
  else waiting.get(data.id)?.(data);
});

function openFrame() {
  ready = new Promise((resolve) => (isReady = resolve));
  frame = h("iframe", {
    class: "diagram-frame",
    src: "web/diagram.html",
    sandbox: "allow-scripts",
    "aria-hidden": "true",
    tabindex: "-1",
    title: "Diagrams",
  });
  document.body.append(frame);
}

/** {svg, title} of a Mermaid text, or {error}: one line that says why there is none. */
export async function drawDiagram(source, dark) {
  if (!frame) openFrame();
  const [used, id] = [frame, ++lastId];
  const reply = new Promise((resolve) => {
    waiting.set(id, resolve);
    setTimeout(resolve, PATIENCE, null);
  });
  ready.then(() => used.contentWindow?.postMessage({ id, source, dark }, "*")); // its origin is opaque
  const result = await reply;
  waiting.delete(id);
  if (result) return result;
  used.remove(); // it may be busy for ever
  if (frame === used) frame = null;
  return { error: "it takes too long" };
}
