// Attention of a trace, spread over the tokens of the text.

/** {window, entries: {position: weight}} of one layer. An entry's weight is divided among its tokens. */
export function heatOf(layer) {
  const [window, entries] = [{}, {}];
  layer.window.forEach((weight, i) => (window[layer.window_start + i] = weight));
  const { start, stop, weight } = layer.entries;
  start.forEach((from, i) => {
    const share = weight[i] / (stop[i] - from);
    for (let at = from; at < stop[i]; at += 1) entries[at] = (entries[at] ?? 0) + share;
  });
  return { window, entries };
}

/** The same, mean over all layers. */
export function meanHeat({ layers }) {
  const [window, entries] = [{}, {}];
  for (const layer of layers) {
    const heat = heatOf(layer);
    for (const [sum, part] of [
      [window, heat.window],
      [entries, heat.entries],
    ])
      for (const [at, weight] of Object.entries(part)) sum[at] = (sum[at] ?? 0) + weight / layers.length;
  }
  return { window, entries };
}

/** A function from a position to its weight's share of the largest, on a scale on which small ones show, 0 to 1. */
export function scaleOf(weights) {
  let top = 1e-9;
  for (const weight of Object.values(weights)) top = Math.max(top, weight);
  return (at) => Math.sqrt((weights[at] ?? 0) / top);
}

/** {window, entries, sink} of a layer: shares of its attention, together 1. */
export function shares(layer) {
  const sum = (weights) => weights.reduce((total, weight) => total + weight, 0);
  return { window: sum(layer.window), entries: sum(layer.entries.weight), sink: layer.sink };
}

/** Text of tokens as it is drawn: special tokens have fullwidth bars, which fonts without CJK lack. */
export function drawable(text) {
  return text.replaceAll("\uff5c", "|");
}
