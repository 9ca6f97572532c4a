"""The native kernels on every instruction set that this machine has."""

from collections.abc import Iterator
from typing import Any

import pytest

from dsv4.kernels import backends

MODULE = backends.native_module()


@pytest.fixture(params=sorted(MODULE.isas()) if MODULE is not None else [])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module with one of its instruction sets selected; tests may change that and the threads."""
    assert MODULE is not None
    MODULE.select(request.param)
    yield MODULE
    MODULE.select(MODULE.isas()[-1])
    MODULE.set_threads(1)
