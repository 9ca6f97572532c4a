"""Compression of each closed window of `ratio` tokens to one entry, and the state of the open windows between batches.

Contract: kv, score fp32 [T, total] of a ragged batch, ape fp32 [ratio, total], windows a Windows (views.py)
-> entries fp32 [windows closed here, width] in sequence order, not normed, None if no window closes; writes the state
rows that later windows need.
ape[position % ratio] is added to score. An entry is the sum of kv over the window's slots, weighted channel by channel
by a softmax of score over the slots. Without overlap width = total. With overlap (twice the tokens) width = total / 2:
the first half of the channels comes from the previous window, the second from the window itself; a sequence's first
window has no previous one. Everything is fp32. The entries are differentiable, the state is not, unless it is not
written.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.compressor import native, reference
from dsv4.kernels.compressor.views import Windows


def compress(kv: Tensor, score: Tensor, ape: Tensor, windows: Windows) -> Tensor | None:
    """Entries [windows, width] from the projections kv, score [T, total]; writes the state."""
    inputs, state = (kv, score, ape), (windows.state_kv, windows.state_score)
    # With a state that it writes the native rung has no gradient.
    stored = windows.state_kv is not None and windows.writes_state
    native_here = backends.uses_native("compressor", *inputs, *state) and not (stored and backends.records(*inputs))
    op = native if native_here else reference
    return op.compress(kv, score, ape, windows)


__all__ = ["Windows", "compress"]
