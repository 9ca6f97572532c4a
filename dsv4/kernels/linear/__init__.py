"""Matrix product with a weight, each row of the result a function of that row of the input alone.

Contract: x [..., in], weight [out, in] of the same dtype -> [..., out]. On x86 CPUs the row independence is to the bit:
it rests on MKL's strict mode, which `dsv4` asks for before torch starts (see dsv4/__init__.py).
"""

from dsv4.kernels.linear.reference import linear

__all__ = ["linear"]
