"""Tables of the rollout queue, and the database that holds them: SQLite or PostgreSQL."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Any

import numpy as np
import sqlalchemy as sql
from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, LargeBinary, MetaData, Table, Text, event
from sqlalchemy.exc import ArgumentError

from dsv4.model.choices import Choices

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
METADATA = MetaData()
REQUESTS = Table(
    "rollout_requests", METADATA,
    Column("id", Integer, primary_key=True),
    Column("run", Text, nullable=False, index=True),
    Column("problem", BigInteger, nullable=False),  # number of the first problem that its batch is of
    Column("version", Integer, nullable=False),  # of the oldest weights that may work on it
    Column("batch", BigInteger, nullable=False, index=True),
    Column("prompt", Integer, nullable=False),  # number of its prompt in the batch
    Column("prompt_token_ids", Text, nullable=False),
    Column("params", Text, nullable=False),
    Column("status", Text, nullable=False, index=True),
    Column("attempt", Integer, nullable=False),  # number of leases so far: the latest alone may write
    Column("stalled", Integer, nullable=False),  # leases since its last token
    Column("leased_until", Float, nullable=False),
    Column("worker", Text),
    Column("lost_by", Text),  # the worker that was silent until another took the request over; the latest one
    Column("finish_reason", Text),
    Column("error", Text),
    sqlite_autoincrement=True,  # no id is used again: a worker that has slept may still hold a lease of it
)  # fmt: skip
RUNS = Table(
    "rollout_runs", METADATA,
    Column("run", Text, primary_key=True),
    Column("learner", Integer, nullable=False),  # number of its learner, one more whenever the run goes on
)  # fmt: skip
TOKENS = Table(
    "rollout_tokens", METADATA,
    Column("request", Integer, ForeignKey(REQUESTS.c.id), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("token_id", Integer, nullable=False),
    Column("log_probability", Float(53), nullable=False),
    Column("version", Integer, nullable=False),
    Column("mask", LargeBinary),  # tokens that could be drawn, a bit each, compressed; none: all
    Column("choices", LargeBinary),  # of the forward that it was drawn from, compressed; none: not recorded
)  # fmt: skip
TURN_SECONDS = 600.0  # that one of a learner's many threads may wait for a connection; a slow disk is no error
_ALLOWED = "sqlite:///FILE, or postgresql://USER@HOST/DATABASE"


class ServiceError(RuntimeError):
    """The rollout service cannot go on: its queue does not answer, or its workers end again and again."""


def shown(url: str) -> str:
    """A database's URL without its password."""
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def database(url: str) -> sql.Engine:
    """The database at a URL. ServiceError for what is no URL of one, or one without its driver."""
    try:
        parsed = sql.make_url(url)
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ServiceError(f"the rollout queue {shown(url)} is no database; allowed: {_ALLOWED}")
        engine = sql.create_engine(parsed, pool_pre_ping=True, pool_timeout=TURN_SECONDS)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise ServiceError(f"the rollout queue {shown(url)} cannot be used: {error}; allowed: {_ALLOWED}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def pack_mask(mask: bytes | None) -> bytes | None:
    """A sampling mask as it is stored."""
    return None if mask is None else zlib.compress(mask, 1)


def unpack_mask(stored: bytes | None) -> bytes | None:
    """A stored sampling mask."""
    return None if stored is None else zlib.decompress(stored)


def pack_choices(choices: Choices | None) -> bytes | None:
    """Experts and entries as they are stored."""
    if choices is None:
        return None
    buffer = BytesIO()
    for part in (choices.experts, choices.entries):
        np.save(buffer, np.empty(0, np.int8) if part is None else part, allow_pickle=False)
    return zlib.compress(buffer.getvalue(), 1)


def unpack_choices(stored: bytes | None) -> Choices | None:
    """Stored experts and entries."""
    if stored is None:
        return None
    buffer = BytesIO(zlib.decompress(stored))
    parts = [np.load(buffer, allow_pickle=False) for _ in range(2)]
    return Choices(*(None if part.dtype == np.int8 else part for part in parts))


def _set_up_sqlite(connection: Any, _: object) -> None:
    """A write-ahead log, each transaction durable when it returns; others wait for a writer."""
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite`
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sql.Connection) -> None:
    reads = connection.get_execution_options().get("dsv4_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
