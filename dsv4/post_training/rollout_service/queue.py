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
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import SQLAlchemyError

from dsv4.post_training.rollout_service.records import Finished, Lease, LoggedToken, NewRequest, Step
from dsv4.post_training.rollout_service.tables import (
    DONE,
    FAILED,
    METADATA,
    REQUESTS,
    RUNNING,
    RUNS,
    TOKENS,
    WAITING,
    ServiceError,
    database,
    pack_choices,
    pack_mask,
    shown,
    unpack_choices,
    unpack_mask,
)

LEASE_SECONDS = 60.0  # that a worker may be silent
MAX_STALLED = 5  # workers that may end on a request without a further token of it
_ENDED = REQUESTS.c.status.in_((DONE, FAILED))
_TABLES_LOCK = 4_053_001  # of PostgreSQL's advisory locks


class RolloutQueue:
    """The queue at `url`: sqlite:///FILE or postgresql://...; any number of processes may open it.

    `lease_seconds`: how long a worker may be silent. `max_stalled`: workers that may end on a request without a further
    token, before it fails: the request may be what ends them. `clock`: seconds, the same for all processes. `run`:
    whose requests these are; runs that share a database see their own alone. `learner`: whose worker this is, of
    `new_learner`; None: any. ServiceError, in words, wherever the database does not answer.
    """

    def __init__(
        self,
        url: str,
        lease_seconds: float = LEASE_SECONDS,
        max_stalled: int = MAX_STALLED,
        clock: Callable[[], float] = time.time,
        run: str = "",
        learner: int | None = None,
    ) -> None:
        if max_stalled < 1:
            raise ValueError(f"max_stalled is {max_stalled}; allowed: 1 or more")
        if not lease_seconds > 0.0:
            raise ValueError(f"lease_seconds is {lease_seconds}; allowed: more than 0")
        self.lease_seconds, self.max_stalled, self.name, self._clock = lease_seconds, max_stalled, run, clock
        self.learner = learner
        self.place, self._engine = shown(url), database(url)
        with self._begin() as connection:
            if connection.dialect.name == "postgresql":  # where one of two that make a table at once fails
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_TABLES_LOCK)))
            METADATA.create_all(connection)

    def close(self) -> None:
        self._engine.dispose()

    def new_learner(self) -> int:
        """Number of the learner that goes on with the run. Workers of earlier ones take no request from now on.

        They may live for a moment yet, with weights that the run has lost.
        """
        row = RUNS.c.run == self.name
        with self._begin() as connection:
            before = connection.execute(sql.select(RUNS.c.learner).where(row).with_for_update()).scalar()
            if before is None:
                connection.execute(RUNS.insert().values(run=self.name, learner=1))
                return 1
            connection.execute(RUNS.update().where(row).values(learner=before + 1))
            return before + 1

    def add(self, batch: int, requests: Iterable[NewRequest], problem: int = 0, version: int = 0) -> None:
        """Queue the requests of a batch, all or none. ValueError if the batch was queued before.

        `version`: of the oldest weights that may work on them. `problem`: number of the first problem that they are of.
        """
        rows = [
            {
                "run": self.name, "problem": problem, "version": version, "batch": batch, "prompt": request.prompt,
                "prompt_token_ids": json.dumps(request.prompt_token_ids), "params": json.dumps(dict(request.params)),
                "status": WAITING, "attempt": 0, "stalled": 0, "leased_until": 0.0,
            }
            for request in requests
        ]  # fmt: skip
        with self._begin() as connection:
            if self._count(connection, REQUESTS.c.batch == batch):
                raise ValueError(f"batch {batch} is in the queue already")
            connection.execute(REQUESTS.insert(), rows)

    def known(self, batch: int) -> bool:
        """True if a batch is in the queue."""
        with self._begin(reads=True) as connection:
            return self._count(connection, REQUESTS.c.batch == batch) > 0

    def lease(self, worker: str, count: int, version: int | None = None, workers: int = 1) -> list[Lease]:
        """Take up to `count` requests that wait, or whose worker has been silent for too long, oldest first.

        None for the worker of an earlier learner.
        `version`: that of the worker's weights; requests that need newer ones are left. `workers`: the number among
        which the requests are divided: one takes its share of them, rounded up.
        """
        now = self._clock()
        free = (REQUESTS.c.status == WAITING) | ((REQUESTS.c.status == RUNNING) & (REQUESTS.c.leased_until < now))
        if version is not None:
            free = free & (REQUESTS.c.version <= version)
        with self._begin() as connection:
            if not self._is_current(connection):
                return []
            if workers > 1:
                count = min(count, -(-self._count(connection, free) // workers))
            chosen = sql.select(REQUESTS).where(REQUESTS.c.run == self.name, free).order_by(REQUESTS.c.id).limit(count)
            found = connection.execute(chosen.with_for_update(skip_locked=True)).all()
            for row in found:
                if row.stalled >= self.max_stalled:
                    error = f"{row.stalled} workers ended on it without a further token, the last was {row.worker}"
                    failed = {"status": FAILED, "error": error, "attempt": row.attempt + 1}
                    connection.execute(REQUESTS.update().where(REQUESTS.c.id == row.id).values(failed))
            rows = [row for row in found if row.stalled < self.max_stalled]
            for row in rows:
                values = {
                    "status": RUNNING, "worker": worker, "attempt": row.attempt + 1, "stalled": row.stalled + 1,
                    "leased_until": now + self.lease_seconds,
                    "lost_by": row.worker if row.status == RUNNING and row.worker != worker else row.lost_by,
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
        with self._begin() as connection:
            ids = [step.lease.id for step in steps]
            running = REQUESTS.c.id.in_(ids) & (REQUESTS.c.status == RUNNING)
            held = _locked(connection, running)
            ours = [step for step in steps if held.get(step.lease.id) == step.lease.attempt]
            rows = [
                {
                    "request": step.lease.id, "position": step.position + place, "token_id": token.token_id,
                    "log_probability": token.log_probability, "version": token.version, "mask": pack_mask(token.mask),
                    "choices": pack_choices(token.choices),
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
        with self._begin(reads=True) as connection:
            return self._count(connection, REQUESTS.c.batch == batch, ~_ENDED)

    def open_batches(self) -> set[int]:
        """Batches with requests that have not ended."""
        query = sql.select(REQUESTS.c.batch).where(REQUESTS.c.run == self.name, ~_ENDED).distinct()
        with self._begin(reads=True) as connection:
            return set(connection.execute(query).scalars())

    def finished(self, batch: int) -> list[Finished]:
        """Requests of a batch that have ended, in the order in which they were queued."""
        query = sql.select(REQUESTS).where(REQUESTS.c.run == self.name, REQUESTS.c.batch == batch, _ENDED)
        with self._begin(reads=True) as connection:
            rows = connection.execute(query.order_by(REQUESTS.c.id)).all()
            logged = _tokens(connection, [row.id for row in rows])
        return [
            Finished(
                row.prompt, tuple(json.loads(row.prompt_token_ids)), tuple(logged.get(row.id, ())), row.finish_reason,
                row.error,
            )
            for row in rows
        ]  # fmt: skip

    def num_tokens(self) -> int:
        """Tokens in the log."""
        query = sql.select(sql.func.count()).select_from(TOKENS.join(REQUESTS)).where(REQUESTS.c.run == self.name)
        with self._begin(reads=True) as connection:
            return connection.execute(query).scalar_one()

    def silent_workers(self) -> set[str]:
        """Workers that did not write for `lease_seconds` while they held a request, others' now or still theirs."""
        late = (REQUESTS.c.status == RUNNING) & (REQUESTS.c.leased_until < self._clock())
        holders = sql.select(REQUESTS.c.worker).where(REQUESTS.c.run == self.name, late)
        losers = sql.select(REQUESTS.c.lost_by).where(REQUESTS.c.run == self.name, REQUESTS.c.lost_by.is_not(None))
        with self._begin(reads=True) as connection:
            return set(connection.execute(holders.union(losers)).scalars())

    def release(self, worker: str | None = None) -> None:
        """Let others go on at once with the requests of a worker that has ended; None: of all workers of the run.

        What such a worker should write after that is refused. After all have ended, none counts as stalled.
        """
        values: dict[str, Any] = {"status": WAITING, "attempt": REQUESTS.c.attempt + 1}
        held = (REQUESTS.c.run == self.name) & (REQUESTS.c.status == RUNNING)
        if worker is not None:
            held = held & (REQUESTS.c.worker == worker)
        else:
            values["stalled"] = 0
        with self._begin() as connection:
            _locked(connection, held)
            connection.execute(REQUESTS.update().where(held).values(values))

    def remove(self, batch: int) -> None:
        """Forget a batch, once its rollouts were learned from."""
        self._remove(REQUESTS.c.batch == batch)

    def keep(self, first: int) -> None:
        """Forget the requests of problems before number `first`."""
        self._remove(REQUESTS.c.problem < first)

    def take_back(self, version: int) -> None:
        """Forget what weights later than `version` drew: the run has lost them, and will give their versions to others.

        A request that needs such weights goes as a whole. One with tokens of them waits again, cut before the first:
        those behind it have it as their context.
        """
        self._remove(REQUESTS.c.version > version)
        lost = (
            sql.select(TOKENS.c.request, sql.func.min(TOKENS.c.position).label("position"))
            .select_from(TOKENS.join(REQUESTS))
            .where(REQUESTS.c.run == self.name, TOKENS.c.version > version)
            .group_by(TOKENS.c.request)
        )
        with self._begin() as connection:
            rows = connection.execute(lost).all()
            _locked(connection, REQUESTS.c.id.in_([row.request for row in rows]))
            for row in rows:
                behind = (TOKENS.c.request == row.request) & (TOKENS.c.position >= row.position)
                connection.execute(TOKENS.delete().where(behind))
                values = {
                    "status": WAITING, "attempt": REQUESTS.c.attempt + 1, "stalled": 0, "finish_reason": None,
                    "error": None,
                }  # fmt: skip
                connection.execute(REQUESTS.update().where(REQUESTS.c.id == row.request).values(values))

    def _remove(self, which: sql.ColumnElement[bool]) -> None:
        which = which & (REQUESTS.c.run == self.name)
        ids = sql.select(REQUESTS.c.id).where(which)
        with self._begin() as connection:
            _locked(connection, which)  # or a worker adds tokens between the two
            connection.execute(TOKENS.delete().where(TOKENS.c.request.in_(ids)))
            connection.execute(REQUESTS.delete().where(which))

    def _is_current(self, connection: sql.Connection) -> bool:
        """True unless this is the queue of an earlier learner's worker; the next learner waits for the transaction."""
        if self.learner is None:
            return True
        query = sql.select(RUNS.c.learner).where(RUNS.c.run == self.name).with_for_update(read=True)
        return connection.execute(query).scalar() == self.learner

    def _count(self, connection: sql.Connection, *which: sql.ColumnElement[bool]) -> int:
        query = sql.select(sql.func.count()).select_from(REQUESTS).where(REQUESTS.c.run == self.name, *which)
        return connection.execute(query).scalar_one()

    @contextmanager
    def _begin(self, reads: bool = False) -> Generator[sql.Connection]:
        """A transaction; `reads`: one that only reads, which waits for no writer."""
        engine = self._engine.execution_options(dsv4_reads=True) if reads else self._engine
        try:
            with engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise ServiceError(f"the rollout queue {self.place} cannot be used: {cause}") from error


def _locked(connection: sql.Connection, which: sql.ColumnElement[bool]) -> dict[int, int]:
    """Requests that nobody else may change now, by id, and their attempts.

    All who wait for locks take them in this order, so that no two wait for each other.
    """
    chosen = sql.select(REQUESTS.c.id, REQUESTS.c.attempt).where(which).order_by(REQUESTS.c.id).with_for_update()
    return {row.id: row.attempt for row in connection.execute(chosen)}


def _tokens(connection: sql.Connection, ids: Sequence[int]) -> dict[int, list[LoggedToken]]:
    """Logged tokens of requests, in order."""
    found: dict[int, list[LoggedToken]] = {}
    query = sql.select(TOKENS).where(TOKENS.c.request.in_(ids)).order_by(TOKENS.c.request, TOKENS.c.position)
    for row in connection.execute(query):
        tokens = found.setdefault(row.request, [])
        assert row.position == len(tokens), "tokens are logged without gaps"
        mask, choices = unpack_mask(row.mask), unpack_choices(row.choices)
        tokens.append(LoggedToken(row.token_id, row.log_probability, row.version, mask, choices))
    return found
