"""Top k of each row; ties go to the lower index.

Contract: scores [..., n] fp32 without NaN, -inf marks entries that may not be chosen; returns int64 [..., k], indices
in ascending order, padded at the end with -1 where fewer than k may be chosen.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.topk import native, reference


def top_k_lowest_index(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row of scores [..., n], k <= n -> int64 [..., k] ascending, -1 last."""
    op = native if backends.uses_native("topk", scores) else reference
    return op.top_k_lowest_index(scores, k)


__all__ = ["top_k_lowest_index"]
