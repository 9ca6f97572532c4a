"""Durable queue of rollout requests with a token-granular write-ahead log, in SQLite or PostgreSQL.

A request is leased to one worker. Every token is written when it is generated, with its log-probability and the version
of the weights that drew it. When a worker dies its lease ends, and another goes on behind the last token: since a
token's noise depends on the request's seed and its position alone, and no result on how a sequence was cut, the tokens
are those of a request that nobody interrupted. Starting again from scratch would favor short answers, which survive
more often (report, Preemptible and Fault-Tolerant Rollout Service).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Column, Float, ForeignKey, Integer, MetaData, Table, Text, event

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_METADATA = MetaData()
REQUESTS = Table(
    "rollout_requests", _METADATA,
    Column("id", Integer, primary_key=True),
    Column("batch", Integer, nullable=False, index=True),
    Column("prompt", Integer, nullable=False),  # number of its prompt in the batch
    Column("prompt_token_ids", Text, nullable=False),
    Column("params", Text, nullable=False),
    Column("status", Text, nullable=False, index=True),
    Column("attempt", Integer, nullable=False),  # number of leases so far: the latest alone may write
    Column("stalled", Integer, nullable=False),  # leases since its last token
    Column("leased_until", Float, nullable=False),
    Column("worker", Text),
    Column("finish_reason", Text),
    Column("error", Text),
)  # fmt: skip
TOKENS = Table(
    "rollout_tokens", _METADATA,
    Column("request", Integer, ForeignKey(REQUESTS.c.id), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("token_id", Integer, nullable=False),
    Column("log_probability", Float, nullable=False),
    Column("version", Integer, nullable=False),
)  # fmt: skip


@dataclass(frozen=True)
class LoggedToken:
    """One generated token: `version` is that of the weights that drew it."""

    token_id: int
    log_probability: float
    version: int


@dataclass(frozen=True)
class NewRequest:
    """A request to ask: `prompt` numbers the prompts of a batch. `params` are keywords of SamplingParams, seed too."""

    prompt: int
    prompt_token_ids: tuple[int, ...]
    params: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.params.get("seed") is None:
            raise ValueError("a request of the queue needs a seed: another worker must draw the same tokens")
        if self.params.get("logprobs_mode") == "processed_logprobs":
            raise ValueError(
                "logprobs_mode is processed_logprobs, but the queue's log keeps no sampling masks; allowed: "
                "raw_logprobs, tempered_logprobs"
            )


@dataclass(frozen=True)
class Lease:
    """A request that a worker may work on until `leased_until`, with the tokens that it has so far."""

    id: int
    attempt: int
    prompt_token_ids: tuple[int, ...]
    params: dict[str, Any]
    tokens: tuple[LoggedToken, ...]


@dataclass(frozen=True)
class Finished:
    """A request that has ended: its tokens, or the error in words that ended it."""

    prompt: int
    prompt_token_ids: tuple[int, ...]
    tokens: tuple[LoggedToken, ...]
    finish_reason: str | None
    error: str | None


class RolloutQueue:
    """The queue at `url`: sqlite:///FILE or postgresql://...; any number of processes may open it.

    `lease_seconds`: how long a worker may be silent. `max_stalled`: workers that may end on a request without a further
    token, before it fails: the request may be what ends them. `clock`: seconds, the same for all processes.
    """

    def __init__(
        self,
        url: str,
        lease_seconds: float = 30.0,
        max_stalled: int = 5,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_stalled < 1:
            raise ValueError(f"max_stalled is {max_stalled}; allowed: 1 or more")
        if not lease_seconds > 0.0:
            raise ValueError(f"lease_seconds is {lease_seconds}; allowed: more than 0")
        self.lease_seconds, self.max_stalled, self._clock = lease_seconds, max_stalled, clock
        self._engine = sql.create_engine(url, pool_pre_ping=True)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _set_up_sqlite)
            event.listen(self._engine, "begin", _begin_immediate)
        _METADATA.create_all(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def add(self, batch: int, requests: Iterable[NewRequest]) -> None:
        """Queue the requests of a batch, all or none. ValueError if the batch was queued before."""
        rows = [
            {
                "batch": batch, "prompt": request.prompt, "prompt_token_ids": json.dumps(request.prompt_token_ids),
                "params": json.dumps(dict(request.params)), "status": WAITING, "attempt": 0, "stalled": 0,
                "leased_until": 0.0,
            }
            for request in requests
        ]  # fmt: skip
        with self._engine.begin() as connection:
            known = sql.select(sql.func.count()).where(REQUESTS.c.batch == batch)
            if connection.execute(known).scalar_one():
                raise ValueError(f"batch {batch} is in the queue already")
            connection.execute(REQUESTS.insert(), rows)

    def lease(self, worker: str, count: int) -> list[Lease]:
        """Take up to `count` requests that wait, or whose worker has been silent for too long, oldest first."""
        now = self._clock()
        free = (REQUESTS.c.status == WAITING) | ((REQUESTS.c.status == RUNNING) & (REQUESTS.c.leased_until < now))
        chosen = sql.select(REQUESTS).where(free).order_by(REQUESTS.c.id).limit(count).with_for_update(skip_locked=True)
        with self._engine.begin() as connection:
            found = connection.execute(chosen).all()
            for row in found:
                if row.stalled >= self.max_stalled:
                    error = f"{row.stalled} workers ended on it without a further token, the last was {row.worker}"
                    failed = {"status": FAILED, "error": error}
                    connection.execute(REQUESTS.update().where(REQUESTS.c.id == row.id).values(failed))
            rows = [row for row in found if row.stalled < self.max_stalled]
            for row in rows:
                values = {
                    "status": RUNNING, "worker": worker, "attempt": row.attempt + 1, "stalled": row.stalled + 1,
                    "leased_until": now + self.lease_seconds,
                }  # fmt: skip
                connection.execute(REQUESTS.update().where(REQUESTS.c.id == row.id).values(values))
            logged = _tokens(connection, [row.id for row in rows])
        return [
            Lease(
                row.id, row.attempt + 1, tuple(json.loads(row.prompt_token_ids)), json.loads(row.params),
                tuple(logged.get(row.id, ())),
            )
            for row in rows
        ]  # fmt: skip

    def write(self, steps: Sequence[Step]) -> set[int]:
        """Append tokens and ends of leased requests in one transaction; returns the ids whose lease is another's now.

        Nothing of those is written. The leases of the others are renewed.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            ids = [step.lease.id for step in steps]
            chosen = sql.select(REQUESTS.c.id, REQUESTS.c.attempt).where(REQUESTS.c.id.in_(ids)).with_for_update()
            held = {row.id: row.attempt for row in connection.execute(chosen)}
            ours = [step for step in steps if held.get(step.lease.id) == step.lease.attempt]
            rows = [
                {
                    "request": step.lease.id, "position": step.position + place, "token_id": token.token_id,
                    "log_probability": token.log_probability, "version": token.version,
                }
                for step in ours
                for place, token in enumerate(step.tokens)
            ]  # fmt: skip
            if rows:
                connection.execute(TOKENS.insert(), rows)
            for step in ours:
                values: dict[str, Any] = {"leased_until": now + self.lease_seconds}
                if step.tokens:
                    values["stalled"] = 0
                if step.error is not None:
                    values |= {"status": FAILED, "error": step.error}
                elif step.finish_reason is not None:
                    values |= {"status": DONE, "finish_reason": step.finish_reason}
                connection.execute(REQUESTS.update().where(REQUESTS.c.id == step.lease.id).values(values))
        return set(ids) - {step.lease.id for step in ours}

    def unfinished(self, batch: int) -> int:
        """Requests of a batch that have not ended."""
        ended = REQUESTS.c.status.in_((DONE, FAILED))
        query = sql.select(sql.func.count()).where(REQUESTS.c.batch == batch, ~ended)
        with self._engine.begin() as connection:
            return connection.execute(query).scalar_one()

    def finished(self, batch: int) -> list[Finished]:
        """Requests of a batch that have ended, in the order in which they were queued."""
        query = sql.select(REQUESTS).where(REQUESTS.c.batch == batch, REQUESTS.c.status.in_((DONE, FAILED)))
        with self._engine.begin() as connection:
            rows = connection.execute(query.order_by(REQUESTS.c.id)).all()
            logged = _tokens(connection, [row.id for row in rows])
        return [
            Finished(
                row.prompt, tuple(json.loads(row.prompt_token_ids)), tuple(logged.get(row.id, ())), row.finish_reason,
                row.error,
            )
            for row in rows
        ]  # fmt: skip

    def remove(self, batch: int) -> None:
        """Forget a batch, once its rollouts were learned from."""
        ids = sql.select(REQUESTS.c.id).where(REQUESTS.c.batch == batch)
        with self._engine.begin() as connection:
            connection.execute(TOKENS.delete().where(TOKENS.c.request.in_(ids)))
            connection.execute(REQUESTS.delete().where(REQUESTS.c.batch == batch))


@dataclass(frozen=True)
class Step:
    """New tokens of a leased request, from output position `position` on, and its end, if it has ended."""

    lease: Lease
    position: int
    tokens: Sequence[LoggedToken] = ()
    finish_reason: str | None = None
    error: str | None = None


def _tokens(connection: sql.Connection, ids: Sequence[int]) -> dict[int, list[LoggedToken]]:
    """Logged tokens of requests, in order."""
    found: dict[int, list[LoggedToken]] = {}
    query = sql.select(TOKENS).where(TOKENS.c.request.in_(ids)).order_by(TOKENS.c.request, TOKENS.c.position)
    for row in connection.execute(query):
        tokens = found.setdefault(row.request, [])
        assert row.position == len(tokens), "tokens are logged without gaps"
        tokens.append(LoggedToken(row.token_id, row.log_probability, row.version))
    return found


def _set_up_sqlite(connection: Any, _: object) -> None:
    """A write-ahead log, each transaction durable when it returns; others wait for a writer."""
    connection.isolation_level = None  # transactions are begun by `_begin_immediate`
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: sql.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
