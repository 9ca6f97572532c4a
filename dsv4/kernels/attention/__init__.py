"""Attention of a group of query tiles over a window and compressed entries, with a sink, in one softmax.

Contract. Shapes: G tiles, R query rows a tile, H heads, D head width (keys are values), W window slots, E entries.
  q [G, R, H, D]; window [G, W, D]; window_mask bool [G, R, W];
  entries either shared [E, D] (all tiles of the group belong to one sequence), a tile's own [G, E, D], or a row's own
  [G, R, E, D] (gathered by the indexer); entry_mask bool [G, R, E]. W is a multiple of KEY_CHUNK, and so is E except in the
  gathered form.
  sink fp32 [H]: a logit that takes probability and gives no value, not scaled.
Returns o [G, R, H, D] in q's dtype, and the probabilities of the entries summed over heads [G, R, E] when asked.
Masked keys must be finite. Scores and sums are fp32. Keys are added KEY_CHUNK at a time, in order: a chunk that a row sees
nothing of adds exact zeros, so leaving it out, before or behind, changes no bit of that row. A row that sees no key gives zeros.
"""

from dsv4.kernels.attention.reference import KEY_CHUNK, attend

__all__ = ["KEY_CHUNK", "attend"]
