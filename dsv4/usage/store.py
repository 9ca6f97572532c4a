"""UsageStore: the ledger's table in a database: an SQLite file, or PostgreSQL by URL through SQLAlchemy.

SQLite needs nothing but Python. The same SQL goes to both, with parameters like `:time`. A file is opened anew for
every operation, so that any thread may call.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from dsv4.usage.records import COLUMNS, UsageRecord

TABLE = "dsv4_usage"
LOCK_SECONDS = 5.0  # that an operation waits for other users of an SQLite file
_TYPES = {"prompt": "BIGINT", "cache": "BIGINT", "completion": "BIGINT", "reasoning": "BIGINT"}
_DOUBLES = ("seconds", "cost_usd")
_SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} ("
    + ", ".join(
        f"{name} {'DOUBLE PRECISION' if name in _DOUBLES else _TYPES.get(name.partition('_')[0], 'TEXT')}"
        + (" PRIMARY KEY" if name == "request_id" else "" if name == "cost_usd" else " NOT NULL")
        for name in COLUMNS
    )
    + ")",
    f"CREATE INDEX IF NOT EXISTS {TABLE}_time ON {TABLE} (time)",
    f"CREATE INDEX IF NOT EXISTS {TABLE}_api_key ON {TABLE} (api_key)",
)
_INSERT = (
    f"INSERT INTO {TABLE} ({', '.join(COLUMNS)}) VALUES ({', '.join(':' + name for name in COLUMNS)}) "
    "ON CONFLICT (request_id) DO NOTHING"  # a batch that failed after its commit is written again
)
_SCHEMA_LOCK = 4_053_002  # of PostgreSQL's advisory locks
_BACKENDS = ("postgresql", "sqlite")  # databases with ON CONFLICT
_ALLOWED = "the path of an SQLite file, or a URL like postgresql://host/name"
Values = Mapping[str, Any]


class UsageStore(Protocol):
    """A database that runs SQL; errors are its library's."""

    def prepare(self) -> None:
        """Makes the table and its indexes if they are missing, also where other processes do so at once."""
        ...

    def write(self, sql: str, rows: Sequence[Values] = ()) -> None:
        """Runs a statement once per row, or once, in one transaction."""
        ...

    def read(self, sql: str, values: Values) -> Iterator[Sequence[Any]]: ...

    def close(self) -> None: ...


class SqliteStore:
    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        self._mode = "rwc" if create else "ro"

    def prepare(self) -> None:
        self.write("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
        for statement in _SCHEMA:
            self.write(statement)

    def write(self, sql: str, rows: Sequence[Values] = ()) -> None:
        with contextlib.closing(self._connect()) as connection, connection:
            connection.executemany(sql, cast(Any, rows)) if rows else connection.execute(sql)

    def read(self, sql: str, values: Values) -> Iterator[Sequence[Any]]:
        with contextlib.closing(self._connect()) as connection:
            yield from connection.execute(sql, values)

    def close(self) -> None:
        """Nothing is held between operations."""

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self._path.resolve().as_uri()}?mode={self._mode}", LOCK_SECONDS, uri=True)


class SqlAlchemyStore:
    def __init__(self, url: str) -> None:
        """ModuleNotFoundError without SQLAlchemy or the driver; ValueError for a URL of no known database."""
        import sqlalchemy
        from sqlalchemy.exc import ArgumentError

        try:
            parsed = sqlalchemy.make_url(url)
        except ArgumentError as error:
            raise ValueError(f"the usage database is no URL; allowed: {_ALLOWED}") from error
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in _BACKENDS:
            raise ValueError(f"the usage database is of the kind {parsed.get_backend_name()!r}; allowed: {_ALLOWED}")
        self._text = sqlalchemy.text
        self._engine = sqlalchemy.create_engine(parsed, pool_pre_ping=True, hide_parameters=True)

    def prepare(self) -> None:
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":  # where one of two that make a table at once fails
                connection.execute(self._text(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})"))
            for statement in _SCHEMA:
                connection.execute(self._text(statement))

    def write(self, sql: str, rows: Sequence[Values] = ()) -> None:
        with self._engine.begin() as connection:
            connection.execute(self._text(sql), [dict(row) for row in rows] or None)

    def read(self, sql: str, values: Values) -> Iterator[Sequence[Any]]:
        with self._engine.connect() as connection:
            yield from cast(Any, connection.execution_options(yield_per=1000).execute(self._text(sql), dict(values)))

    def close(self) -> None:
        self._engine.dispose()


def is_url(place: str) -> bool:
    return "://" in place


def open_store(place: str, *, create: bool = True) -> UsageStore:
    """The usage database at a path or URL, with its table, which `create` makes if it is missing.

    ValueError or OSError, in words and without the URL's password, for a database that cannot be used.
    """
    if is_url(place):
        store: UsageStore = SqlAlchemyStore(place)
    elif not create and not Path(place).is_file():
        raise FileNotFoundError(f"{place} does not exist; dsv4 serve --usage-db {place} makes it")
    else:
        store = SqliteStore(Path(place), create=create)
    try:
        if create:
            store.prepare()
        else:
            list(store.read(f"SELECT request_id FROM {TABLE} LIMIT 1", {}))
    except Exception as error:  # each database has errors of its own
        store.close()
        if not type(error).__module__.startswith(("sqlite3", "sqlalchemy")):
            raise
        name = place.rpartition("@")[2] if is_url(place) else place
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise ValueError(f"the usage database {name} cannot be used: {reason}") from error
    return store


def insert(store: UsageStore, records: Sequence[UsageRecord]) -> None:
    """Writes records in one transaction; those that are there already stay as they are."""
    store.write(_INSERT, [asdict(record) for record in records])


def read_records(store: UsageStore, since: str = "", until: str = "~") -> Iterator[UsageRecord]:
    """Records of requests that arrived from `since` until before `until`, by time."""
    sql = f"SELECT {', '.join(COLUMNS)} FROM {TABLE} WHERE time >= :since AND time < :until ORDER BY time, request_id"
    return (UsageRecord(*row) for row in store.read(sql, {"since": since, "until": until}))
