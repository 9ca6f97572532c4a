// A tool call of an answer as a card that folds: name, arguments, result, or a field for the result while it is awaited.

import { codeBlock } from "./code.js";
import { h, icon } from "./dom.js";

/** JSON text with line breaks and indentation; any other text as it is. */
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

const isJson = (text) => /^\s*[[{]/.test(text);

/** View of one call {id, name, arguments, result}. `result` is undefined until it is given. */
export class ToolCard {
  constructor() {
    this.name = h("strong", {});
    this.state = h("span", { class: "tool-state" });
    this.input = codeBlock("", "json");
    this.field = h("textarea", { rows: "3", "aria-label": "Result", spellcheck: "false" });
    this.output = h("div", {});
    this.label = h("p", { class: "tool-label" }, "Result");
    const summary = h("summary", {}, icon("tool"), this.name, this.state, icon("right"));
    this.element = h(
      "details",
      { class: "tool-card" },
      summary,
      h("p", { class: "tool-label" }, "Arguments"),
      this.input,
      this.label,
      this.output,
      this.field,
    );
  }

  /** Draws the call. `state`: "writing" | "awaited" (the result can be given) | "done" | "dropped" (incomplete). */
  update(call, state) {
    this.name.textContent = call.name;
    this.state.textContent = { writing: "being written", awaited: "waits for its result", dropped: "incomplete" }[state] ?? "";
    this.input.setText(state === "writing" ? call.arguments : pretty(call.arguments));
    this.field.hidden = state !== "awaited";
    this.label.hidden = state !== "awaited" && state !== "done";
    this.field.setAttribute("aria-label", `Result of ${call.name}`);
    if (state === "done" && this.shown !== call.result) {
      this.shown = call.result;
      this.output.replaceChildren(codeBlock(pretty(call.result), isJson(call.result) ? "json" : ""));
    }
    if (this.drawn !== state) this.element.open = state === "awaited";
    this.drawn = state;
  }
}

/** View of all calls of an answer. `send(results)` is called with their results, in order. */
export class ToolCards {
  constructor(send) {
    this.cards = [];
    const results = () => this.cards.map((card) => card.field.value);
    this.button = h("button", { type: "submit", class: "button" }, "Send results");
    const onsubmit = (event) => {
      event.preventDefault();
      send(results());
    };
    this.element = h("form", { class: "tool-cards", "aria-label": "Tool calls", onsubmit }, this.button);
  }

  update(node) {
    const calls = node.toolCalls ?? [];
    this.element.hidden = !calls.length;
    for (const call of calls.slice(this.cards.length)) {
      const card = new ToolCard();
      this.cards.push(card);
      this.button.before(card.element);
    }
    for (const card of this.cards.splice(calls.length)) card.element.remove();
    calls.forEach((call, i) => this.cards[i].update(call, stateOf(node, call)));
    this.button.hidden = !calls.length || stateOf(node, calls[0]) !== "awaited";
    this.button.textContent = calls.length > 1 ? "Send results" : "Send result";
  }
}

function stateOf(node, call) {
  if (node.status === "streaming") return "writing";
  if (node.status !== "done") return "dropped";
  return call.result === undefined ? "awaited" : "done";
}
