"""Attention of a ragged batch over a window and compressed entries, with a sink, in one softmax.

Contract. Letters: T tokens, H heads, D head width (keys are values), k entries that the indexer chooses.
  q [T, H, D], rotated, not scaled;
  keys a KeyView (views.py): the batch's own keys, the rings of earlier ones, the pool of entries, nothing gathered;
  tiles: the reference's cut of the batch, which other kernels do not read;
  sink fp32 [H]: a logit that takes probability and gives no value, not scaled;
  chosen int64 [T, k] ascending, -1 behind: the entries that a token reads if it sees more than k of them (a token that
  sees fewer reads them all); None where no token does.
Returns o [T, H, D] in q's dtype, not rotated back, and for the indexer's loss, when asked, the probabilities of each
tile group's entries summed over heads [tiles, rows, entries].
A token at position p sees positions p - 127 to p of its sequence, and entry e once p + 1 >= (e + 1) * ratio. Scores and
sums are fp32, under autocast too. Keys that a row may not see must be finite in the reference (it multiplies them by
zero); the native kernel does not read them. A row that sees no key gives zeros.
Order of the reference's sums: the window is one sum over the slots of a tile, which depend on its place in the sequence
and on nothing else. Entries are added ENTRY_CHUNK at a time, in order: a chunk of which a row sees nothing adds exact
zeros, so a row's bits do not depend on how many masked entries follow. Native: the order in docs/kernels.md.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention import native, reference
from dsv4.kernels.attention.reference import ENTRY_CHUNK
from dsv4.kernels.attention.views import EntryView, KeyView, TileGroup, Tiles


def attend(
    q: Tensor, keys: KeyView, tiles: Tiles, sink: Tensor, chosen: Tensor | None = None, keep_probs: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    """(o [T, H, D], a list per tile group of the entries' probabilities, empty unless kept)."""
    if not keep_probs and backends.uses_native("attention", q, keys.new, keys.ring, sink):
        return native.attend(q, keys, sink, chosen), []
    return reference.attend(q, keys, tiles, sink, chosen, keep_probs)


__all__ = ["ENTRY_CHUNK", "EntryView", "KeyView", "TileGroup", "Tiles", "attend"]
