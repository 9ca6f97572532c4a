// View of one answer: thinking panel, text, failure, and a footer with actions and statistics.

import { announce } from "./banner.js";
import { copyFrom, h, icon, iconButton } from "./dom.js";
import { describeDetails, describePhase, describeSpeed, describeThinking, duration, shareRead } from "./figures.js";
import { MarkdownView } from "./markdown.js";
import { pager } from "./pager.js";
import { ToolCards } from "./tool-card.js";

/**
 * `actions`: {again(node), goOn(node), retry(node), editQuestion(node), pick(node), inspect(node), fresh(),
 * sendResults(node, results of its tool calls)}.
 */
export class AnswerView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.time = h("span", { class: "thinking-label" });
    this.thinkingBody = h("div", { class: "thinking-body" });
    // Open while the model thinks, closed when the answer begins, unless the reader has toggled it.
    this.touched = false;
    const summary = h("summary", { onclick: () => (this.touched = true) }, icon("think"), this.time, icon("right"));
    this.thinking = h("details", { class: "thinking" }, summary, this.thinkingBody);
    this.thinkingText = new MarkdownView(this.thinkingBody);
    this.waitNote = h("span", { class: "wait-note" });
    this.fill = h("div");
    this.bar = h(
      "div",
      { class: "bar", role: "progressbar", "aria-label": "Prompt read", "aria-valuemin": "0", "aria-valuemax": "100" },
      this.fill,
    );
    const dots = h("span", { class: "dots" }, h("i"), h("i"), h("i"));
    this.waiting = h("div", { class: "waiting" }, dots, this.waitNote, this.bar);
    this.body = h("div", { class: "answer" });
    this.text = new MarkdownView(this.body);
    this.calls = new ToolCards((results) => actions.sendResults(node, results));
    this.noticeText = h("span");
    this.goOn = h("button", { type: "button", class: "link", onclick: () => actions.goOn(node) }, "Continue");
    this.notice = h("p", { class: "notice" }, this.noticeText, " ", this.goOn);
    this.failure = h("div", { class: "failure", role: "alert" });
    this.details = h("dl", { class: "answer-details", id: `details-${node.id}`, hidden: true });
    this.stats = h("button", {
      type: "button",
      class: "stats",
      title: "Details",
      "aria-controls": this.details.id,
      "aria-expanded": "false",
      onclick: () => this.openDetails(this.details.hidden),
    });
    this.copy = iconButton("copy", "Copy answer", () => copyFrom(this.copy, node.content));
    this.again = iconButton("again", "Answer again", () => actions.again(node));
    this.inspect = iconButton("inspect", "Inspect answer", () => actions.inspect(node));
    this.pager = pager(node, actions);
    this.foot = h("footer", {}, this.pager, this.copy, this.again, this.inspect, this.stats);
    const parts = [this.thinking, this.waiting, this.body, this.calls.element, this.notice, this.failure, this.foot, this.details];
    this.element = h("article", { class: "message assistant", "aria-label": "Answer" }, ...parts);
    this.update();
  }

  /** Draws the node's current state. */
  update() {
    const { node } = this;
    const streaming = node.status === "streaming";
    this.element.dataset.status = node.status;
    this.element.setAttribute("aria-busy", streaming);
    this.drawThinking(streaming && !node.content && !node.toolCalls);
    this.waiting.hidden = !streaming || Boolean(node.content || node.reasoning?.trim() || node.toolCalls);
    this.calls.update(node);
    this.text.show(node.content, streaming);
    this.noticeText.textContent = noticeOf(node);
    this.notice.hidden = !this.noticeText.textContent;
    this.goOn.hidden = !node.content || node.status === "done";
    this.drawFailure();
    this.copy.hidden = !node.content;
    this.inspect.hidden = streaming || !node.answerId || !node.tokens;
    this.again.hidden = streaming || node.status === "error";
    this.stats.textContent = describeSpeed(
      streaming ? (node.before?.tokens ?? 0) + (node.timings?.predicted_n ?? node.pieces) : node.tokens,
      node.timings,
    );
    this.stats.hidden = !this.stats.textContent;
    if (!this.details.hidden) this.openDetails(true);
    this.tick();
  }

  openDetails(open) {
    this.details.hidden = !open;
    this.stats.setAttribute("aria-expanded", open);
    if (!open) return;
    this.details.replaceChildren(
      ...describeDetails(this.node).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]),
    );
  }

  /** Redraws the parts that depend on the time alone. */
  tick() {
    const { node } = this;
    if (node.status !== "streaming") return;
    const now = Date.now();
    if (!node.content && !node.toolCalls && node.thinkingSince) {
      const spent = now - node.thinkingSince;
      this.time.textContent = spent < 1000 ? "Thinking" : `Thinking ${duration(spent)}`;
    }
    if (!this.waiting.hidden) this.drawWaiting(now);
  }

  drawWaiting(now) {
    const { phase } = this.node;
    const note = describePhase(phase, now);
    if (note !== this.waitNote.textContent) this.waitNote.textContent = note;
    if (note && this.announced !== phase.kind) {
      this.announced = phase.kind; // once per kind of waiting, not per number
      announce(note);
    }
    const share = shareRead(phase, now);
    this.bar.hidden = share === null;
    if (share === null) return;
    this.bar.setAttribute("aria-valuenow", Math.floor(share * 100));
    this.bar.setAttribute("aria-valuetext", note);
    this.fill.style.scale = `${share} 1`;
  }

  drawThinking(live) {
    const { node, thinking } = this;
    const thought = Boolean(node.reasoning?.trim());
    thinking.hidden = !thought;
    if (!thought) return;
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
    if (!live) this.time.textContent = describeThinking(node.thinkMs);
  }

  drawFailure() {
    const { error } = this.node;
    this.failure.hidden = !error;
    if (!error) this.failure.replaceChildren();
    if (!error || this.failure.childElementCount) return;
    this.failure.append(
      icon("alert"),
      h("div", {}, h("strong", {}, error.title), h("p", {}, error.detail)),
      this.remedy(error),
    );
  }

  remedy(error) {
    const button = (label, onclick) => h("button", { type: "button", class: "button quiet", onclick }, label);
    if (error.kind === "context") {
      const edit = button("Edit message", () => this.actions.editQuestion(this.node));
      return h("span", { class: "remedies" }, edit, button("New chat", () => this.actions.fresh()));
    }
    return button("Try again", () => this.actions.retry(this.node));
  }
}

/** How an answer ended, if not as it should have; else "". */
export function noticeOf(node) {
  if (node.status === "length") return "Stopped at the token limit.";
  if (node.status === "stopped") return node.content ? "This answer was stopped." : "Stopped before the answer began.";
  if (node.status === "done" && !node.content && !node.toolCalls) return "The model gave no answer.";
  return "";
}
