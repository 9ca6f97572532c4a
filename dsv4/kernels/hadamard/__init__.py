"""Normalised Walsh-Hadamard transform of the last dimension, natural (Sylvester) order, no random signs.

Contract: x [..., n], n a power of two, any float dtype; computed in fp32, returned in x's dtype. Orthogonal and
symmetric, so it is its own inverse and its own backward.
"""

from dsv4.kernels.hadamard.reference import hadamard

__all__ = ["hadamard"]
