"""Attention of a group of query tiles over a window and compressed entries, with a sink, in one softmax.

Contract. Shapes: G tiles, R query rows a tile, H heads, D head width (keys are values), W window slots, E entries.
  q [G, R, H, D]; window [G, W, D]; window_mask bool [G, R, W];
  entries either shared [E, D] (all tiles of the group belong to one sequence), a tile's own [G, E, D], or a row's own
  [G, R, E, D] (gathered by the indexer); entry_mask bool [G, R, E]; E a multiple of ENTRY_CHUNK unless gathered.
  sink fp32 [H]: a logit that takes probability and gives no value, not scaled.
Returns o [G, R, H, D] in q's dtype, and the probabilities of the entries summed over heads [G, R, E] when asked.
Masked keys must be finite. Scores and sums are fp32, under autocast too. The window is one sum: which slots it has may
depend on the tile's place in its sequence, on nothing else. Entries are added ENTRY_CHUNK at a time, in order: a chunk
of which a row sees nothing adds exact zeros, so a row's bits do not depend on how many masked entries follow. A row
that sees no key gives zeros.
"""

from dsv4.kernels.attention.reference import ENTRY_CHUNK, attend

__all__ = ["ENTRY_CHUNK", "attend"]
