"""Fixtures: ledger databases of both kinds."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.usage.records import UsageRecord


def record(**fields: Any) -> UsageRecord:
    """A record of a request to deepseek-v4-pro at an off-peak hour."""
    known: dict[str, Any] = {
        "time": "2026-11-02T12:00:00.000Z",
        "request_id": "r1",
        "wire_format": "chat.completions",
        "model": "deepseek-v4-pro",
        "api_key": "****1234#00000000",
        "user_id": "ann",
        "prompt_tokens": 1000,
        "cache_hit_tokens": 600,
        "cache_miss_tokens": 400,
        "completion_tokens": 100,
        "reasoning_tokens": 30,
        "finish_reason": "stop",
        "seconds": 1.5,
        "cost_usd": 0.25,
    }
    return UsageRecord(**known | fields)


@pytest.fixture
def sqlite_place(tmp_path: Path) -> str:
    return str(tmp_path / "usage.db")


def _binaries() -> Path | None:
    """Folder of PostgreSQL's programs; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Folder of the socket of a PostgreSQL server; skips where there is none. PostgreSQL refuses to run as root."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("psycopg")
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
    account: dict[str, Any] = {}
    if os.name == "posix" and os.getuid() == 0:
        account = {"user": "nobody", "cwd": "/"}
    folder = Path(tempfile.mkdtemp(prefix="dsv4-pg-"))  # a socket's path has to be short
    folder.chmod(0o777)
    data = str(folder / "data")

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **account)
        if done.returncode:
            pytest.skip(f"PostgreSQL does not run here: {done.stderr[-300:]}")

    try:
        run(str(binaries / "initdb"), "-D", data, "-U", "dsv4", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        log = str(folder / "log")
        run(str(binaries / "pg_ctl"), "-D", data, "-w", "-t", "60", "-l", log, "-o", options, "start")
        try:
            yield str(folder)
        finally:
            stop = [str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop"]
            subprocess.run(stop, capture_output=True, check=False, timeout=60, **account)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_place(postgres_server: str) -> Iterator[str]:
    """URL of a database without our table."""
    import sqlalchemy

    from dsv4.usage.store import TABLE

    url = f"postgresql+psycopg://dsv4@/postgres?host={postgres_server}"
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP TABLE IF EXISTS {TABLE}"))
    engine.dispose()
    yield url.replace("postgresql+psycopg", "postgresql")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def place(request: pytest.FixtureRequest) -> str:
    """Path or URL of an empty usage database."""
    return request.getfixturevalue(f"{request.param}_place")
