"""Compression of each closed window of `ratio` tokens to one entry, and the state of the open windows between batches.

Contract: kv, score fp32 [T, total] of a ragged batch, ape fp32 [ratio, total], windows a Windows (views.py)
-> entries fp32 [windows closed here, width] in the order of the sequences, not normed, None when none closes; the rows
of the state that later windows need are written.
score gets ape[position % ratio] added. An entry is the sum of kv over the window's slots, weighted channel by channel
by a softmax of score over the slots. Without overlap width = total. With overlap (twice the tokens) width = total / 2:
the first half of the channels comes from the window before, the second from the window's own; the first window of a
sequence has no window before. Everything is fp32, under autocast too. The entries are differentiable, the state is not.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.compressor import native, reference
from dsv4.kernels.compressor.views import Windows


def compress(kv: Tensor, score: Tensor, ape: Tensor, windows: Windows) -> Tensor | None:
    """Entries [windows, width] of the projections kv, score [T, total]; writes the state."""
    state = (windows.state_kv, windows.state_score)
    op = native if backends.uses_native("compressor", kv, score, ape, *state) else reference
    return op.compress(kv, score, ape, windows)


__all__ = ["Windows", "compress"]
