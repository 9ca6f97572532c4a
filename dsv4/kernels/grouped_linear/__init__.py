"""Rows sorted by group, each group times its own weight: the routed experts' matrix products.

Contract: x [n, in], sizes (rows of each group, in order, adding up to n), weights one [out, in] a group, all of x's
dtype -> [n, out]. A group without rows is not touched, and its weight gets no gradient (None). Row i depends on row i
alone.
"""

from dsv4.kernels.grouped_linear.reference import grouped_linear

__all__ = ["grouped_linear"]
