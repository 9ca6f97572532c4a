// A code block in Mermaid that shows its diagram: as an image, so that nothing in it can run.

import { isDark } from "./colours.js";
import { drawDiagram } from "./diagrams.js";
import { h } from "./dom.js";

document.addEventListener("colours", () => {
  for (const figure of document.querySelectorAll("figure.diagram")) figure.complete();
});

/** Adds the diagram to a code block; `figure.complete()` draws it, once its text (`source()`) is whole. */
export function addDiagram(figure, source) {
  const image = h("img", {});
  const shown = h("div", { class: "diagram-image", tabindex: "0", role: "group", "aria-label": "Diagram" }, image);
  const note = h("p", { class: "plain-note", hidden: true });
  const toggle = h("button", { type: "button", class: "code-copy", hidden: true, onclick: () => show(shown.hidden) });
  const show = (diagram) => {
    shown.hidden = !diagram;
    figure.querySelector("pre").hidden = diagram;
    toggle.textContent = diagram ? "Show source" : "Show diagram";
  };
  figure.classList.add("diagram");
  figure.querySelector("figcaption").lastChild.before(toggle);
  figure.append(shown, note);
  show(false);
  let drawn = ""; // text and colours of the latest drawing
  figure.complete = async () => {
    const text = source();
    const wanted = `${isDark()} ${text}`;
    if (drawn === wanted || !text.trim()) return;
    const isFirst = !drawn;
    drawn = wanted;
    const { svg, title, error } = await drawDiagram(text, isDark());
    if (drawn !== wanted) return; // the text or the colours have changed meanwhile
    toggle.hidden = Boolean(error);
    note.hidden = !error;
    note.textContent = error ? `This diagram cannot be drawn: ${error}` : "";
    if (error) return show(false);
    image.alt = title || `Diagram: ${text.trim().split("\n", 1)[0]}`;
    setImage(image, svg);
    if (isFirst) show(true);
  };
}

function setImage(image, svg) {
  const url = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  image.onload = image.onerror = () => URL.revokeObjectURL(url);
  image.src = url;
}
