// Runs in the sandboxed frame diagram.html: draws each Mermaid text that the page sends and returns it as an SVG text.
// Mermaid needs inline styles, which only the frame's content policy allows; the frame has an origin of its own.

const LONGEST = 50_000; // characters of a diagram
const MOST_EDGES = 500;

/** {svg, title} of a Mermaid text; the SVG is XML with a size of its own. Throws what Mermaid does. */
async function draw(id, source, dark) {
  globalThis.mermaid.initialize({
    startOnLoad: false,
    securityLevel: "strict",
    suppressErrorRendering: true,
    theme: dark ? "dark" : "default",
    fontFamily: "sans-serif", // an image has no web fonts: measured and shown must be the same
    maxTextSize: LONGEST,
    maxEdges: MOST_EDGES,
    htmlLabels: false,
    flowchart: { htmlLabels: false },
  });
  const { svg: html } = await globalThis.mermaid.render(`diagram-${id}`, source);
  const svg = new DOMParser().parseFromString(html, "text/html").querySelector("svg");
  const [, , width, height] = svg.getAttribute("viewBox").split(/[\s,]+/);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  const title = svg.querySelector(":scope > title")?.textContent ?? "";
  return { svg: new XMLSerializer().serializeToString(svg), title };
}

/** The line of an error that says most. */
function reason(error) {
  return String(error?.message ?? error).split("\n", 1)[0].replace(/:\s*$/, "");
}

addEventListener("message", async (event) => {
  if (event.source !== parent) return;
  const { id, source, dark } = event.data;
  try {
    parent.postMessage({ id, ...(await draw(id, source, dark)) }, "*");
  } catch (error) {
    parent.postMessage({ id, error: reason(error) }, "*");
  }
});
parent.postMessage({ ready: true }, "*");
