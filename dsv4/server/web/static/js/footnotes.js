// Footnotes of Markdown: [^1] in the text, [^1]: at the beginning of a line. A note is shown where it stands.

// Numbers, and names that end in one: [^abc] is more likely a piece of a regular expression.
const LABEL = String.raw`(\d{1,3}|[A-Za-z]+-?\d{1,3})`;
const REFERENCE = new RegExp(String.raw`^\[\^${LABEL}\](?![:(])`);
const NOTE = new RegExp(String.raw`^ {0,3}\[\^${LABEL}\]:[ \t]+([^\n]+(?:\n(?!\s*\n| {0,3}\[\^)[^\n]+)*)\n*`);

/** Extensions of marked. `escape`: makes a text safe in HTML. */
export function footnoteExtensions(escape) {
  return [
    {
      name: "footnote",
      level: "block",
      start: (source) => /^ {0,3}\[\^/m.exec(source)?.index,
      tokenizer(source) {
        const [raw, label, text] = NOTE.exec(source) ?? [];
        return raw && { type: "footnote", raw, label, tokens: this.lexer.inlineTokens(text) };
      },
      renderer({ label, tokens }) {
        return `<p class="footnote-text"><sup>${escape(label)}</sup> ${this.parser.parseInline(tokens)}</p>`;
      },
    },
    {
      name: "footnoteReference",
      level: "inline",
      start: (source) => source.indexOf("[^"),
      tokenizer(source) {
        const [raw, label] = REFERENCE.exec(source) ?? [];
        return raw && { type: "footnoteReference", raw, label };
      },
      renderer: ({ label }) => `<sup class="footnote-mark">${escape(label)}</sup>`,
    },
  ];
}
