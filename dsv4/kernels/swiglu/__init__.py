"""Clamped SwiGLU of the experts: silu(min(gate, limit)) * clamp(up, -limit, limit), times the routing weight if given.

Contract: gate, up [n, width], weight [n, 1] fp32 or None; computed in fp32, returned in gate's dtype. The gate is
clamped from above only. Clamped elements receive no gradient.
"""

from dsv4.kernels.swiglu.reference import clamped_swiglu

__all__ = ["clamped_swiglu"]
