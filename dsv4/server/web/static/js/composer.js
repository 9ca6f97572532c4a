// The composer: message text, DeepThink and effort switches, send and stop.

import { setupAttachments } from "./attachments.js";
import { byId, h, icon } from "./dom.js";
import { foldButton, measure } from "./fold.js";
import { isComposing } from "./keys.js";
import { UNBROKEN } from "./markdown.js";
import { changeProfile, profile } from "./profiles.js";

const SUGGESTIONS = [
  "What is 47 + 38?",
  "Solve for x: 3*x + 4 = 19",
  "Spell this word backward (example: sun -> nus): lemon",
  "What is the capital of France?",
  "Extract name and city as JSON: Anna is 34 years old and lives in Rome.",
];

/** `actions`: {send(text, files), stop(), shown() -> id of the chat}. Returns the composer's handle. */
export function setupComposer(actions) {
  const area = byId("prompt");
  const button = byId("send");
  const think = byId("think");
  const effort = byId("effort");
  let running = false;

  let size = 0; // characters at the last input event
  let folded = false;

  const setFolded = (on) => {
    folded = on;
    refresh();
    if (on) area.scrollTop = 0;
    else area.focus();
  };
  const fold = foldButton("prompt", (open) => setFolded(!open));
  area.after(fold);

  const attachments = setupAttachments(byId("attached"), () => refresh(), (text) => {
    area.setRangeText(text, area.selectionStart, area.selectionEnd, "end");
    refresh();
    area.focus();
  });
  setupFiles(attachments);
  const refresh = () => {
    const { value } = area;
    const { isLong } = measure(value);
    folded &&= isLong;
    area.classList.toggle("folded", folded);
    area.classList.toggle("unbroken", UNBROKEN.test(value));
    fold.hidden = !isLong;
    fold.draw(!folded, value);
    area.style.height = folded ? "" : "auto";
    if (!folded) area.style.height = `${area.scrollHeight}px`;
    button.disabled = !running && !value.trim() && !attachments.any();
    size = value.length;
  };
  const written = () => {
    // Too much for one keystroke: the text was pasted or dropped.
    const pasted = measure(area.value.slice(0, Math.max(area.value.length - size, 0))).isLong;
    folded ||= pasted;
    refresh();
    if (pasted) requestAnimationFrame(() => (area.scrollTop = 0));
  };
  const send = async () => {
    const target = actions.shown();
    await attachments.settled();
    const text = area.value.trim();
    if (running || actions.shown() !== target || (!text && !attachments.any())) return;
    area.value = "";
    actions.send(text, attachments.take());
  };
  const drawMode = () => {
    const mode = profile();
    think.setAttribute("aria-checked", mode.thinking);
    effort.disabled = !mode.thinking;
    for (const input of effort.querySelectorAll("input")) input.checked = input.value === mode.effort;
  };

  think.append(icon("think"), "DeepThink");
  think.addEventListener("click", () => {
    changeProfile({ thinking: !profile().thinking });
    drawMode();
  });
  effort.addEventListener("change", (event) => changeProfile({ effort: event.target.value }));
  document.addEventListener("profile", drawMode);
  drawMode();

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) actions.stop();
    else send();
  });
  area.addEventListener("input", written);
  area.addEventListener("paste", (event) => {
    const text = event.clipboardData.getData("text/plain");
    const { files } = event.clipboardData;
    if (!text && files.length) attachments.add([...files]);
    else if (measure(text).isLong) attachments.paste(text);
    else return;
    event.preventDefault();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
    event.preventDefault();
    send();
  });
  byId("composer").addEventListener(
    "click",
    (event) => event.target.closest("button, label, textarea") || area.focus(),
  );
  byId("suggestions").append(
    ...SUGGESTIONS.map((text) =>
      h("button", { type: "button", class: "suggestion", onclick: () => actions.send(text) }, text),
    ),
  );

  const setRunning = (on) => {
    running = on;
    button.classList.toggle("running", on);
    button.setAttribute("aria-label", on ? "Stop" : "Send message");
    button.title = on ? "Stop (Esc)" : "Send (Enter)";
    button.replaceChildren(icon(on ? "stop" : "send"));
    refresh();
  };
  setRunning(false);
  return {
    setRunning,
    focus: () => area.focus(),
  };
}

/** The button for files, and files dropped on the composer. */
function setupFiles(attachments) {
  const input = byId("attach-files");
  byId("attach").append(icon("clip"));
  byId("attach").addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    await attachments.add([...input.files]);
    input.value = "";
    byId("prompt").focus();
  });
  const form = byId("composer");
  form.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  form.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    attachments.add([...event.dataTransfer.files]);
  });
}
