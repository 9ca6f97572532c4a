"""Largest k of each row; equal values go to the lower index.

Contract: scores [..., n] fp32 without NaN, -inf marks what may not be chosen; returns int64 [..., k], indices in
ascending order, -1 in the places that no admissible entry fills (they come last).
"""

from dsv4.kernels.topk.reference import top_k_lowest_index

__all__ = ["top_k_lowest_index"]
