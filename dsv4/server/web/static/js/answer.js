// The view of one answer: thinking panel, text, failure, and the line of actions and figures below.

import { copyFrom, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { pager } from "./pager.js";

/** Seconds as people read them: "3.2 s", "1 min 5 s". */
export function duration(ms) {
  const seconds = ms / 1000;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

/** `actions`: {again(node), retry(node), pick(node), fresh()}; `versions`: the answer's siblings. */
export class AnswerView {
  constructor(node, versions, actions) {
    this.node = node;
    this.actions = actions;
    this.time = h("span", { class: "thinking-label" });
    this.thinkingBody = h("div", { class: "thinking-body" });
    // Open while the model thinks, closed when the answer begins; a reader's own click has the last word.
    this.touched = false;
    const summary = h("summary", { onclick: () => (this.touched = true) }, icon("think"), this.time, icon("right"));
    this.thinking = h("details", { class: "thinking" }, summary, this.thinkingBody);
    this.thinkingText = new MarkdownView(this.thinkingBody);
    this.waitNote = h("span", { class: "wait-note" });
    this.waiting = h("div", { class: "waiting" }, h("i"), h("i"), h("i"), this.waitNote);
    this.body = h("div", { class: "answer" });
    this.text = new MarkdownView(this.body);
    this.notice = h("p", { class: "notice" });
    this.failure = h("div", { class: "failure", role: "alert" });
    this.stats = h("span", { class: "stats" });
    this.copy = iconButton("copy", "Copy answer", () => copyFrom(this.copy, node.content));
    this.again = iconButton("again", "Answer again", () => actions.again(node));
    this.foot = h("footer", {}, pager(node, versions, actions), this.copy, this.again, this.stats);
    const parts = [this.thinking, this.waiting, this.body, this.notice, this.failure, this.foot];
    this.element = h("article", { class: "message assistant", "aria-label": "Answer" }, ...parts);
    this.update();
  }

  /** Draws the node as it is now. */
  update() {
    const { node } = this;
    const streaming = node.status === "streaming";
    this.element.dataset.status = node.status;
    this.element.setAttribute("aria-busy", streaming);
    this.drawThinking(streaming && !node.content);
    this.waiting.hidden = !streaming || Boolean(node.content || node.reasoning);
    this.text.show(node.content, streaming);
    this.notice.textContent = noticeOf(node);
    this.notice.hidden = !this.notice.textContent;
    this.drawFailure();
    this.copy.hidden = !node.content;
    this.again.hidden = streaming || node.status === "error";
    this.stats.textContent = statsOf(node);
    this.stats.title = statsTitle(node);
    this.tick();
  }

  /** Redraws what depends on the clock alone. */
  tick() {
    const { node } = this;
    if (node.status !== "streaming") return;
    const now = Date.now();
    if (!node.content && node.thinkingSince) this.time.textContent = `Thinking ${duration(now - node.thinkingSince)}`;
    const waited = now - (node.startedAt ?? now);
    this.waitNote.textContent = waited > 3000 ? `The model is reading, ${duration(waited)}` : "";
  }

  drawThinking(live) {
    const { node, thinking } = this;
    thinking.hidden = !node.reasoning;
    if (!node.reasoning) return;
    const pinned =
      thinking.open &&
      this.thinkingBody.scrollHeight - this.thinkingBody.scrollTop - this.thinkingBody.clientHeight < 24;
    this.thinkingText.show(node.reasoning, live);
    const changed = thinking.classList.contains("live") !== live;
    thinking.classList.toggle("live", live);
    if (live && changed && !this.touched) thinking.open = true;
    if (!live && changed && !this.touched) thinking.open = false;
    this.thinkingBody.classList.toggle("overflowing", this.thinkingBody.scrollHeight > this.thinkingBody.clientHeight);
    if (live && (pinned || changed)) this.thinkingBody.scrollTop = this.thinkingBody.scrollHeight;
    if (!live) this.time.textContent = `Thought for ${duration(node.thinkMs ?? 0)}`;
  }

  drawFailure() {
    const { error } = this.node;
    this.failure.hidden = !error;
    if (!error || this.failure.childElementCount) return;
    this.failure.append(
      icon("alert"),
      h("div", {}, h("strong", {}, error.title), h("p", {}, error.detail)),
      this.remedy(error),
    );
  }

  remedy(error) {
    const button = (label, onclick) => h("button", { type: "button", class: "button quiet", onclick }, label);
    if (error.kind === "context") return button("New chat", () => this.actions.fresh());
    return button("Try again", () => this.actions.retry(this.node));
  }
}

function noticeOf(node) {
  if (node.status === "length") return "Stopped at the token limit.";
  if (node.status === "stopped") return "This answer was stopped.";
  if (node.status === "done" && !node.content) return "The model gave no answer.";
  return "";
}

function statsOf(node) {
  const streaming = node.status === "streaming";
  const tokens = streaming ? node.pieces : node.tokens;
  if (!tokens) return "";
  const count = `${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`;
  return node.speed ? `${count} · ${node.speed.toFixed(node.speed < 100 ? 1 : 0)} tokens/s` : count;
}

function statsTitle(node) {
  const { usage } = node;
  const lines = [node.model];
  if (usage) {
    lines.push(
      `Prompt: ${usage.prompt_tokens} tokens, ${usage.prompt_tokens_details?.cached_tokens ?? 0} of them cached`,
    );
    const reasoning = usage.completion_tokens_details?.reasoning_tokens;
    if (reasoning) lines.push(`Reasoning: ${reasoning} of ${usage.completion_tokens} tokens`);
  }
  if (node.waitMs !== undefined) lines.push(`First token after ${duration(node.waitMs)}`);
  return lines.filter(Boolean).join("\n");
}
