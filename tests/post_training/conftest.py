"""Fixtures of post-training."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..usage.conftest import postgres_server  # noqa: F401  # a fixture
from .small_policy import has_f


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database for rollout queues; in PostgreSQL's, runs are apart by their names."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    return f"postgresql://dsv4@/postgres?host={request.getfixturevalue('postgres_server')}"


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text that has no f calls a tool, so that a random policy takes several turns."""
    call = {"name": "run", "arguments": {"command": "x"}}
    monkeypatch.setattr("dsv4.data.tasks.parse_tool_calls", lambda text: [] if has_f(text) else [call])
