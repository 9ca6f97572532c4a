// Splits a growing Markdown text into top-level blocks, in one pass over its lines. Each block is formatted separately:
// a text that grows costs only its last block, and a block that cannot be formatted stays plain text, the rest intact.
//
// block  {kind: "markdown" | "code" | "plain", source, info, closed, reason, goesOn, end, head}
//        code: `source` is the text between the fences, `info` the words after the first, `closed` true after the last;
//        plain: `reason` says why;
//        goesOn: true for a list, table or paragraph too long for one block, which the next block continues;
//        end: offset of the next block in the text; head: header lines of a table, passed to the next block.

const LONG = 8_000; // characters after which a list, table, quote or paragraph continues in a new block
const TOO_LONG = 40_000; // longest block that is formatted, in characters
const LONG_LINE = 10_000; // the same per line: formatting is quadratic in it at worst
const LONG_FORMULA = 4_000; // longest displayed formula, in characters
const DEEPEST = 32; // nested quotes and lists

const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const INNER_FENCE = /^[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(`{3,}(?=[^`]*$)|~{3,})/;
const ITEM = /^[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)/;
const TOP_ITEM = /^ ?(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)/;
const MARKER = /[ \t]*(?:>|[-*+](?=[ \t]|$)|\d{1,9}[.)](?=[ \t]|$))/y;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const INK = /\S/g;
const MATH = /^[ \t]*(\$\$|\\\[)/;

/** Splitter of a growing text; rescans only from its open block on. */
export class BlockSplitter {
  constructor() {
    this.text = "";
    this.restart();
  }

  restart() {
    [this.kept, this.offset, this.head] = [0, 0, ""];
  }

  /** Returns {kept, blocks}: the first `kept` blocks are unchanged, `blocks` follow them. */
  push(text) {
    if (!text.startsWith(this.text)) this.restart();
    this.text = text;
    const kept = this.kept;
    const blocks = [];
    for (let block = nextBlock(text, this.offset, this.head); block; block = nextBlock(text, this.offset, this.head)) {
      blocks.push(block);
      if (block.end >= text.length) break; // still open
      [this.offset, this.head] = [block.end, block.head];
      this.kept += 1;
    }
    return { kept, blocks };
  }
}

/** The block that begins at or after `from`; null if only blank lines are left. `head`: of a continued table. */
function nextBlock(text, from, head) {
  const start = skipBlankLines(text, from);
  if (start >= text.length) return null;
  const fence = FENCE.exec(lineAt(text, start));
  if (fence) return fencedCode(text, start, fence);
  const scan = new Scan(text, start, head);
  let at = start;
  while (at < text.length) {
    const end = lineEnd(text, at);
    const line = lineAt(text, at);
    if (at > start && scan.endsBefore(line, at)) break;
    scan.take(line, end - at);
    at = end + 1;
  }
  return scan.block(Math.min(at, text.length));
}

/** State of a block while its lines are read. */
class Scan {
  constructor(text, start, head) {
    Object.assign(this, { text, start, head, size: 0, lines: 0, reason: "", goesOn: false });
    this.list = this.table = this.blank = false;
    this.fence = this.formula = ""; // closing delimiter while open, else ""
    this.quote = text[start] === ">";
    this.indented = /^(?: {4}|\t)/.test(lineAt(text, start));
    if (head) this.table = true;
  }

  /** True if the block ends before this line. */
  endsBefore(line, at) {
    const size = at - this.start;
    if (this.formula && size > LONG_FORMULA) this.formula = "";
    if (this.fence || this.formula || !line.trim()) return false;
    if (this.blank) return !this.goesOnAfterBlank(line);
    if (FENCE.test(line) && !(this.list && /^ {2}/.test(line))) return true;
    if (size < LONG) return false;
    this.goesOn = this.list ? TOP_ITEM.test(line) : !this.quote || line.startsWith(">");
    return this.goesOn;
  }

  goesOnAfterBlank(line) {
    if (!this.list) return this.indented && /^(?: {4}|\t)/.test(line);
    if (!ITEM.test(line)) return /^(?: {2}|\t)/.test(line);
    this.goesOn = TOP_ITEM.test(line) && this.size > LONG;
    return !this.goesOn;
  }

  take(line, length) {
    this.size += length + 1;
    this.lines += 1;
    this.blank = !line.trim() && length <= LONG_LINE;
    if (this.blank) return;
    if (this.lines === 2 && !this.table && !this.list && line.includes("|") && line.length < LONG_LINE)
      this.table = TABLE_RULE.test(line);
    if (this.fence) {
      const closing = line.trim();
      if (closing.startsWith(this.fence) && !closing.replaceAll(this.fence[0], "")) this.fence = "";
      return;
    }
    this.takeFormula(line);
    if (length > LONG_LINE || this.size > TOO_LONG) this.reason = "long";
    else if (depthOf(line) > DEEPEST) this.reason = "deep";
    if (ITEM.test(line)) this.list = true;
    if (this.list) this.fence = INNER_FENCE.exec(line)?.[1] ?? "";
  }

  takeFormula(line) {
    let rest = line;
    if (!this.formula) {
      const opening = MATH.exec(line);
      if (!opening) return;
      this.formula = opening[1] === "$$" ? "$$" : "\\]";
      rest = line.slice(opening[0].length);
    }
    if (rest.includes(this.formula)) this.formula = "";
  }

  block(end) {
    const own = this.text.slice(this.start, end);
    const head = this.table && this.goesOn ? this.head || own.split("\n", 2).join("\n") + "\n" : "";
    return {
      kind: this.reason ? "plain" : "markdown",
      source: this.head + own.trimEnd(),
      reason: this.reason,
      goesOn: this.goesOn,
      end,
      head,
    };
  }
}

function fencedCode(text, start, [, indent, marks, info]) {
  const first = lineEnd(text, start) + 1;
  let [at, close] = [first, text.length];
  let end = text.length;
  while (at < text.length) {
    const stop = lineEnd(text, at);
    const line = text.slice(at, Math.min(stop, at + marks.length + 200)).trim();
    if (line.startsWith(marks) && !line.replaceAll(marks[0], "")) {
      [close, end] = [at, Math.min(stop + 1, text.length)];
      break;
    }
    at = stop + 1;
  }
  let source = text.slice(first, close);
  if (source.endsWith("\n")) source = source.slice(0, -1);
  if (indent) source = source.replace(new RegExp(`^ {1,${indent.length}}`, "gm"), "");
  const closed = close < text.length;
  return { kind: "code", source, info, closed, reason: "", goesOn: false, end, head: "" };
}

/** Nesting depth of quotes and lists at a line, from its markers and the indentation before them. */
function depthOf(line) {
  const indent = /^[ \t]*/.exec(line)[0].length;
  let count = 0;
  MARKER.lastIndex = 0;
  while (count <= DEEPEST && MARKER.test(line)) count += 1;
  return count && count + Math.floor(indent / 2);
}

/** Start of the first non-blank line at or after `from`. */
function skipBlankLines(text, from) {
  INK.lastIndex = from;
  const ink = INK.exec(text);
  return ink ? Math.max(from, text.lastIndexOf("\n", ink.index) + 1) : text.length;
}

function lineEnd(text, at) {
  const end = text.indexOf("\n", at);
  return end < 0 ? text.length : end;
}

/** The line at `at`; only the beginning of a very long line. */
function lineAt(text, at) {
  return text.slice(at, Math.min(lineEnd(text, at), at + LONG_LINE + 1));
}
