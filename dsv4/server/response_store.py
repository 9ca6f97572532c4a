"""ResponseStore: answered responses and what they answered, for later requests that continue or read them.

SQLite, in memory or in a file that outlives the server. Each response is stored with the input of its own request only:
what came before it is in the responses that it continues.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dsv4.server.unchecked_json import Json

logger = logging.getLogger("dsv4.server")

MAX_BYTES = 256 << 20
_VERSION = 1
_SCHEMA = f"""
CREATE TABLE responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, used INTEGER NOT NULL, bytes INTEGER NOT NULL,
    items TEXT NOT NULL, response TEXT NOT NULL
);
CREATE INDEX by_use ON responses (used, bytes);
PRAGMA user_version = {_VERSION};
"""


Row = tuple[str, str, str | None]  # response, items, previous


class NotStoredError(LookupError):
    """There is no response of this id, or it is someone else's."""

    def __init__(self, response_id: str) -> None:
        super().__init__(response_id)
        self.response_id = response_id


@dataclass(frozen=True)
class StoredResponse:
    """A response, the input items of its request, and the id of the response that it continues."""

    response: Json
    items: list[Json]
    previous: str | None

    @classmethod
    def of(cls, row: Row) -> StoredResponse:
        return cls(json.loads(row[0]), json.loads(row[1]), row[2])

    @property
    def output(self) -> list[Json]:
        return cast("list[Json]", self.response["output"])


class ResponseStore:
    """Responses by id and owner, at most `max_bytes` of JSON: those that were not used for longest go first.

    Calls may come from any thread.
    """

    def __init__(self, path: str | Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        """`path`: the file, made if there is none; None: in memory. ValueError for a file that is something else."""
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        if path is not None and not os.path.exists(path):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # it will hold what users write
        self._database = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
        try:
            self._open(path)
        except BaseException:
            self._database.close()
            raise

    def _open(self, path: str | Path | None) -> None:
        try:
            version = cast(int, self._one("PRAGMA user_version")[0])
            others = self._one("SELECT count(*) FROM sqlite_master")[0]
            if version == 0 and others == 0:
                self._database.executescript(_SCHEMA)
            elif version != _VERSION:
                raise ValueError(f"{path} is a database of version {version}, no store of responses ({_VERSION})")
            # A response is written at once, to the disk at a checkpoint: a crash of the machine may lose the latest.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no store of responses: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def save(self, owner: str, response: Json, items: str, previous: str | None) -> bool:
        """Stores a response; `items`: the input items of its request as JSON.

        False if it cannot be stored: it is larger than the bound, or the file cannot be written, which is logged.
        """
        text = json.dumps(response)
        size = len(text) + len(items)
        if size > self.max_bytes:
            return False
        try:
            with self._lock, self._database as database:
                row = (response["id"], owner, previous, self._next_use(), size, items, text)
                database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._make_room(database)
        except sqlite3.Error:
            logger.exception("response %s is not stored", response["id"])
            return False
        return True

    def _make_room(self, database: sqlite3.Connection) -> None:
        total = cast(int, self._one("SELECT sum(bytes) FROM responses")[0])
        while total > self.max_bytes:
            oldest, freed = self._one("SELECT id, bytes FROM responses ORDER BY used LIMIT 1")
            database.execute("DELETE FROM responses WHERE id = ?", (oldest,))
            total -= cast(int, freed)

    def get(self, owner: str, response_id: str) -> StoredResponse:
        """Raises NotStoredError."""
        with self._lock:
            row = self._get(owner, response_id)
        return StoredResponse.of(row)

    def chain(self, owner: str, response_id: str) -> list[StoredResponse]:
        """A response and all that it continues, the first one first; all count as used. Raises NotStoredError."""
        found: list[Row] = []
        with self._lock, self._database as database:
            used, following = self._next_use(), cast("str | None", response_id)
            while following is not None:
                found.append(self._get(owner, following))
                database.execute("UPDATE responses SET used = ? WHERE id = ?", (used, following))
                following = found[-1][2]
        return [StoredResponse.of(row) for row in found[::-1]]  # without the lock: `save` may not wait for long texts

    def delete(self, owner: str, response_id: str) -> None:
        """Raises NotStoredError. Responses that continue it cannot be continued any more."""
        with self._lock, self._database as database:
            statement = "DELETE FROM responses WHERE id = ? AND owner = ?"
            if database.execute(statement, (response_id, owner)).rowcount == 0:
                raise NotStoredError(response_id)

    def _get(self, owner: str, response_id: str) -> Row:
        statement = "SELECT response, items, previous FROM responses WHERE id = ? AND owner = ?"
        row = self._database.execute(statement, (response_id, owner)).fetchone()
        if row is None:
            raise NotStoredError(response_id)
        return row

    def _next_use(self) -> int:
        return cast(int, self._one("SELECT coalesce(max(used), 0) + 1 FROM responses")[0])

    def _one(self, statement: str) -> tuple[object, ...]:
        return self._database.execute(statement).fetchone()


@dataclass(frozen=True)
class OwnResponses:
    """The stored responses of one owner, who sees no others."""

    store: ResponseStore
    owner: str

    @property
    def keeps(self) -> bool:
        return self.store.max_bytes > 0

    def get(self, response_id: str) -> StoredResponse:
        return self.store.get(self.owner, response_id)

    def delete(self, response_id: str) -> None:
        self.store.delete(self.owner, response_id)

    def context(self, response_id: str) -> list[Json]:
        """Items of a conversation up to and with a response. Raises NotStoredError."""
        chain = self.store.chain(self.owner, response_id)
        return [item for stored in chain for item in (*stored.items, *stored.output)]

    def input_items(self, response_id: str) -> list[Json]:
        """Items that a response answers, from the beginning of its conversation. Raises NotStoredError."""
        chain = self.store.chain(self.owner, response_id)
        before = [item for stored in chain[:-1] for item in (*stored.items, *stored.output)]
        return before + chain[-1].items

    def saver(self, items: list[Json], previous: str | None) -> Callable[[Json], bool]:
        """`ResponseStore.save` for the response to these input items."""
        text = json.dumps(items)
        return lambda response: self.store.save(self.owner, response, text, previous)
