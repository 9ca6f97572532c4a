"""Attention of a ragged batch over a window and compressed entries, with a sink, in one softmax.

Contract. Letters: T tokens, H heads, D head width (keys are also the values), k entries chosen by the indexer.
  q [T, H, D], rotated, not scaled;
  keys a KeyView (views.py): the batch's own keys, the rings of earlier keys, a cache's or received from other processes
  with a gradient, the pool of entries, nothing gathered;
  tiles: the reference's cut of the batch; other kernels ignore it;
  sink fp32 [H]: a logit, not scaled, that takes probability and adds no value;
  chosen int64 [T, k] ascending, padded with -1: the entries that a token reads if it sees more than k of them (a token
  that sees at most k reads them all); None if no token sees more than k.
Returns o [T, H, D] in q's dtype, not rotated back, and on request, for the indexer's loss, the probabilities of the
entries that a token reads, in order, summed over heads: [T, k], zero behind the last, without gradient; with chosen
None k is the most entries that a token sees, at least 1 (KeyView.most_chosen).
A token at position p sees positions p - 127 to p of its sequence, and entry e once p + 1 >= (e + 1) * ratio. Scores and
sums are fp32. Keys hidden from a row must be finite in the reference (it multiplies them by zero);
the native kernel does not read them. A row that sees no key gives zeros.
Summation order of the reference: the window is one sum over the slots of a tile, which depend only on the tile's place
in the sequence. Entries are added ENTRY_CHUNK at a time, in order: a chunk hidden from a row adds exact zeros, so a
row's bits do not depend on how many masked entries follow. Native: the order in docs/kernels.md.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention import native, reference
from dsv4.kernels.attention.reference import ENTRY_CHUNK, Probabilities
from dsv4.kernels.attention.views import EntryView, KeyView, StoredRows, TileGroup, Tiles


def attend(
    q: Tensor, keys: KeyView, tiles: Tiles, sink: Tensor, chosen: Tensor | None = None, keep_probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(o [T, H, D], the entries' probabilities [T, k] if kept)."""
    pool = keys.entries.pool if keys.entries is not None else None
    fresh = [rows.fresh for rows in (keys.ring, pool) if rows is not None]
    inputs = (q, keys.new, *fresh, sink)
    # With a cache the native rung has neither probabilities nor a gradient.
    if backends.uses_native("attention", *inputs) and not (keys.cached and (keep_probs or backends.records(*inputs))):
        return native.attend(q, keys, sink, chosen, keep_probs)
    out, probs = reference.attend(q, keys, tiles, sink, chosen, keep_probs)
    if not keep_probs:
        return out, None
    width = chosen.shape[1] if chosen is not None else keys.most_chosen
    return out, reference.token_probs([own.entries() for own in probs], tiles, width)


def attend_watched(
    q: Tensor, keys: KeyView, tiles: Tiles, sink: Tensor, chosen: Tensor | None = None
) -> tuple[Tensor, list[Probabilities]]:
    """(o [T, H, D], all probabilities per tile group), for traces: on the reference."""
    return reference.attend(q, keys, tiles, sink, chosen, keep_probs=True)


__all__ = [
    "ENTRY_CHUNK", "EntryView", "KeyView", "Probabilities", "StoredRows", "TileGroup", "Tiles", "attend",
    "attend_watched",
]  # fmt: skip
