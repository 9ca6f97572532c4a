// The messages of the shown conversation, and where the page is scrolled to.

import { AnswerView } from "./answer.js";
import * as conversations from "./conversations.js";
import { byId, icon } from "./dom.js";
import { QuestionView } from "./question.js";

const NEAR_END = 60; // pixels

export class Thread {
  /** `actions`: what the buttons under messages do. */
  constructor(actions) {
    this.actions = actions;
    this.views = new Map(); // node id -> view
    this.dirty = new Set();
    this.following = true; // keep the end in view
    this.held = false; // the reader turned the wheel up: only scrolling down to the end follows it again
    [this.top, this.height] = [0, 0]; // where the scroller was
    this.scroller = byId("thread");
    this.column = byId("messages");
    this.jump = byId("jump");
    this.jump.append(icon("down"));
    this.jump.addEventListener("click", () => this.toEnd(true));
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    // At once, not when the view has moved: content that arrives in between would take the reader back to the end.
    this.scroller.addEventListener("wheel", (event) => event.deltaY < 0 && this.hold(), { passive: true });
    const observer = new ResizeObserver(() => (this.following ? this.toEnd() : this.scrolled()));
    observer.observe(this.column);
    observer.observe(this.scroller); // a banner above it takes from its height
    setInterval(() => this.views.forEach((view) => view.tick()), 100);
  }

  /** Shows the conversation's picked messages; `following` false keeps the reader's place. */
  show(conversation, following = true) {
    const nodes = conversations.path(conversation);
    this.dirty.clear();
    this.views = new Map(nodes.map((node) => [node.id, this.view(conversation, node)]));
    this.column.replaceChildren(...[...this.views.values()].map((view) => view.element));
    byId("main").classList.toggle("empty", nodes.length === 0);
    this.following = following;
    if (following) this.toEnd();
    this.scrolled();
  }

  view(conversation, node) {
    const versions = conversations.siblings(conversation, node);
    const signature = versions.map((version) => version.id).join();
    const old = this.views.get(node.id);
    if (old?.node === node && old.signature === signature) {
      old.update();
      return old;
    }
    const View = node.role === "user" ? QuestionView : AnswerView;
    return Object.assign(new View(node, versions, this.actions), { signature });
  }

  /** Redraws a message soon: pieces that arrive within one frame are drawn together. */
  changed(node) {
    if (!this.views.has(node.id)) return;
    if (this.dirty.size === 0) this.schedule();
    this.dirty.add(node.id);
  }

  schedule() {
    // A long answer takes longer to draw: never spend more than about a third of the time on it.
    const pause = (this.cost ?? 0) * 2;
    setTimeout(() => requestAnimationFrame(() => this.draw()), pause);
  }

  draw() {
    const start = performance.now();
    for (const id of this.dirty) this.views.get(id)?.update();
    this.dirty.clear();
    this.cost = performance.now() - start;
  }

  hold() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    if (scrollHeight <= clientHeight) return;
    [this.following, this.held] = [false, true];
    // From here on: the event of the page's own last move to the end may still come, and is not the reader's.
    [this.top, this.height] = [scrollTop, scrollHeight];
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    const left = scrollHeight - scrollTop - clientHeight;
    // A reader who scrolls up, however little, wants to stay there; content that shrinks moves the view up too.
    const up = scrollTop < this.top - 1 && scrollHeight >= this.height;
    const down = scrollTop > this.top + 1;
    if (this.held && down && left < NEAR_END) this.held = false;
    // Still on the way down to the end, which has moved on meanwhile, is following too.
    this.following = !this.held && (up ? left < 2 : this.following || left < NEAR_END);
    [this.top, this.height] = [scrollTop, scrollHeight];
    this.jump.hidden = left < NEAR_END * 3;
  }

  toEnd(smooth = false) {
    [this.following, this.held] = [true, false];
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: smooth ? "smooth" : "instant" });
  }
}
