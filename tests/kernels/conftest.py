"""Fixtures: the native kernels on every instruction set of the machine, and every rung of an operation."""

from collections.abc import Iterator
from typing import Any

import pytest

from dsv4.kernels import backends

MODULE = backends.native_module()
ISAS = sorted(MODULE.isas()) if MODULE is not None else []


def use(isa: str) -> Iterator[Any]:
    assert MODULE is not None
    MODULE.select(isa)
    yield MODULE
    MODULE.select(MODULE.isas()[-1])
    MODULE.set_threads(1)


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module with one of its instruction sets selected; tests may change the selection and the threads."""
    yield from use(request.param)


@pytest.fixture(params=["reference", *ISAS])
def rung(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run operations on the reference, or natively on one instruction set; what is declined is an error."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
        yield request.param
        return
    monkeypatch.setattr(backends, "requested", lambda: True)
    for _ in use(request.param):
        yield request.param
