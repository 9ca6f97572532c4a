"""Setup of all tests: one thread, and uninitialized memory that cannot pass for zeros."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import dsv4  # before torch: it pins MKL's rounding mode

import torch  # isort: skip
import pytest
from hypothesis import settings
from torch.utils._device import _device_constructors

assert dsv4.__version__
os.environ["DSV4_CHECK"] = "1"  # inherited by helper processes and servers
torch.set_num_threads(1)
# No time limit per example, for one may take long where all cores compute. All else as hypothesis has it, also its own
# profile of continuous integration.
settings.register_profile("dsv4", settings(), deadline=None)
settings.load_profile("dsv4")
# torch.device("meta") finds the functions it redirects in a table that it fills at first use. Fill it before
# torch.empty is replaced below, or a model meant for the meta device would be built on the CPU.
_device_constructors()

# Without a C compiler reasoning-gym cannot be installed; tests that make, score or train on its tasks are then skipped.
HAS_TASKS = importlib.util.find_spec("reasoning_gym") is not None
collect_ignore = [] if HAS_TASKS else ["data", "evals", "recipes"]

POISON_INT = -(2**30) + 1


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap `make`: tensors returned to the package's code hold NaN (floats) or a senseless index (int32, int64)."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("dsv4") or out.device.type == "meta":
            return out
        with torch.no_grad():
            if out.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                out.fill_(float("nan"))
            elif out.dtype in (torch.int32, torch.int64):
                out.fill_(POISON_INT)
        return out

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def poison_empty_tensors() -> Iterator[None]:
    """Patch torch.empty and its relatives for calls from dsv4 only: a read before the write shows up as NaN."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
