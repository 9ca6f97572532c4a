// The thread: messages of the shown conversation, and the scroll position.

import { AnswerView } from "./answer.js";
import * as conversations from "./conversations.js";
import { byId, icon } from "./dom.js";
import { QuestionView } from "./question.js";

const NEAR_END = 60; // pixels

export class Thread {
  /** `actions`: callbacks of the buttons under messages. */
  constructor(actions) {
    this.actions = actions;
    this.views = new Map(); // node id -> view
    this.dirty = new Set();
    this.following = true; // keep the end in view
    this.held = false; // the reader scrolled up by wheel: following resumes only at the end
    [this.top, this.height] = [0, 0]; // the scroller's last position and height
    this.scroller = byId("thread");
    this.column = byId("messages");
    this.jump = byId("jump");
    this.jump.append(icon("down"));
    this.jump.addEventListener("click", () => this.toEnd(true));
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    // At once, before the scroll event: content that arrives in between would move the reader back to the end.
    this.scroller.addEventListener("wheel", (event) => event.deltaY < 0 && this.hold(), { passive: true });
    const observer = new ResizeObserver(() => (this.following ? this.toEnd() : this.scrolled()));
    observer.observe(this.column);
    observer.observe(this.scroller); // a banner above it changes its height
    setInterval(() => this.views.forEach((view) => view.tick()), 100);
  }

  /** Shows the conversation's picked messages; `following` false keeps the scroll position. */
  show(conversation, following = true) {
    const nodes = conversations.path(conversation);
    this.views = new Map(nodes.map((node) => [node.id, this.view(conversation, node)]));
    this.dirty.clear();
    arrange(this.column, [...this.views.values()].map((view) => view.element));
    byId("main").classList.toggle("empty", nodes.length === 0);
    this.following = following;
    if (following) this.toEnd();
    this.scrolled();
  }

  view(conversation, node) {
    const View = node.role === "user" ? QuestionView : AnswerView;
    const old = this.views.get(node.id);
    const view = old?.node === node ? old : new View(node, this.actions);
    // Another tab's change is told by the time of the save alone.
    if (view === old && (this.dirty.has(node.id) || view.saved !== node.saved)) view.update();
    view.saved = node.saved;
    view.pager.show(conversations.siblings(conversation, node));
    return view;
  }

  /** Schedules a redraw of a message: pieces that arrive within one frame are drawn together. */
  changed(node) {
    if (!this.views.has(node.id)) return;
    if (this.dirty.size === 0) this.schedule();
    this.dirty.add(node.id);
  }

  schedule() {
    // Drawing a long answer is slow: spend at most about a third of the time on it.
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
    // Reset the last position: a scroll event of the page's own move to the end may be pending and is not the reader's.
    [this.top, this.height] = [scrollTop, scrollHeight];
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    const left = scrollHeight - scrollTop - clientHeight;
    // Scrolling up, however little, stops the following; shrinking content moves the view up too and must not.
    const up = scrollTop < this.top - 1 && scrollHeight >= this.height;
    const down = scrollTop > this.top + 1;
    if (this.held && down && left < NEAR_END) this.held = false;
    // Moving down towards the end, which may have moved on meanwhile, counts as following.
    this.following = !this.held && (up ? left < 2 : this.following || left < NEAR_END);
    [this.top, this.height] = [scrollTop, scrollHeight];
    this.jump.hidden = left < NEAR_END * 3;
  }

  toEnd(smooth = false) {
    [this.following, this.held] = [true, false];
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: smooth ? "smooth" : "instant" });
  }
}

/** Makes `elements` the children of `place`. Those that stay there are not moved, which would take their focus. */
function arrange(place, elements) {
  for (const child of [...place.children]) if (!elements.includes(child)) child.remove();
  elements.forEach((element, i) => {
    if (place.children[i] !== element) place.insertBefore(element, place.children[i] ?? null);
  });
}
