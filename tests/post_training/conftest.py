"""Fixtures of post-training."""

from __future__ import annotations

import pytest

from .small_policy import has_f


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text that has no f calls a tool, so that a random policy takes several turns."""
    call = {"name": "run", "arguments": {"command": "x"}}
    monkeypatch.setattr("dsv4.data.tasks.parse_tool_calls", lambda text: [] if has_f(text) else [call])
