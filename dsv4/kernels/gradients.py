"""Numbers that the native products of a backward multiply: fp32, or both factors rounded to BF16, with fp32 sums.

The choice of the forward holds for its backward. It affects the gradients of linear, grouped_linear and cross_entropy;
values of the forward, parameters and gradients stay fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from dsv4.kernels import backends

logger = logging.getLogger("dsv4")

_bf16: ContextVar[bool] = ContextVar("bf16_gradients", default=False)


@contextmanager
def bf16_gradients(enabled: bool = True) -> Iterator[None]:
    """Gradients of forwards in this context multiply BF16 numbers, on instruction sets that do so faster than fp32."""
    token = _bf16.set(enabled)
    try:
        yield
    finally:
        _bf16.reset(token)


def rounds_to_bf16() -> bool:
    """True if gradients are to multiply BF16 numbers and the selected instruction set can."""
    if not _bf16.get():
        return False
    native = backends.native_module()
    if native is not None and native.has_bf16_gradients():
        return True
    _say_fp32(native.selected() if native is not None else None)
    return False


@cache
def _say_fp32(isa: str | None) -> None:
    """Warn, once per instruction set, that gradients stay fp32; isa None: on the reference."""
    on = "the reference" if isa is None else f"the instruction set {isa}"
    logger.warning(f"kernels: fp32 products in gradients, because {on} has none of BF16; avx512_bf16 has")
