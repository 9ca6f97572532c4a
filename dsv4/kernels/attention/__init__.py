"""Attention of a ragged batch over a window and compressed entries, with a sink, in one softmax.

Contract. Letters: T tokens, H heads, D head width (keys are also the values), k entries chosen by the indexer.
  q [T, H, D], rotated, not scaled;
  keys a KeyView (views.py): the batch's own keys, the rings of earlier keys, the pool of entries, nothing gathered;
  tiles: the reference's cut of the batch; other kernels ignore it;
  sink fp32 [H]: a logit, not scaled, that takes probability and adds no value;
  chosen int64 [T, k] ascending, padded with -1: the entries that a token reads if it sees more than k of them (a token
  that sees at most k reads them all); None if no token sees more than k.
Returns o [T, H, D] in q's dtype, not rotated back, and on request, for the indexer's loss and for traces, the
probabilities per tile group, summed over heads: those of the reference, which then computes o too.
A token at position p sees positions p - 127 to p of its sequence, and entry e once p + 1 >= (e + 1) * ratio. Scores and
sums are fp32, under autocast too. Keys hidden from a row must be finite in the reference (it multiplies them by zero);
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
) -> tuple[Tensor, list[Probabilities]]:
    """(o [T, H, D], probabilities per tile group if kept)."""
    pool = keys.entries.pool if keys.entries is not None else None
    fresh = [rows.fresh for rows in (keys.ring, pool) if rows is not None]
    if not keep_probs and backends.uses_native("attention", q, keys.new, *fresh, sink):
        return native.attend(q, keys, sink, chosen), []
    return reference.attend(q, keys, tiles, sink, chosen, keep_probs)


__all__ = ["ENTRY_CHUNK", "EntryView", "KeyView", "Probabilities", "StoredRows", "TileGroup", "Tiles", "attend"]
