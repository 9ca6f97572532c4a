"""Ledger: writes usage records to a database in its own thread, so that no answer waits for it or fails."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Sequence

from dsv4.notices import SparseLog
from dsv4.usage.records import UsageRecord
from dsv4.usage.store import TABLE, UsageStore, insert

CAPACITY = 10_000  # records that wait for the database; further ones are dropped and counted
_BATCH = 500  # records per transaction
_PATIENCE_SECONDS = 0.2  # between two looks at whether the ledger is closing
_RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0)  # pauses after failures in a row; the last one repeats

logger = logging.getLogger("dsv4.server")


class Ledger:
    """Takes records from any thread. A database that fails is tried again until it works or the ledger is closed."""

    def __init__(self, store: UsageStore, capacity: int = CAPACITY) -> None:
        """Takes over the store."""
        self._store = store
        self._waiting: queue.Queue[UsageRecord] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._counting = threading.Lock()
        self._log = SparseLog(logger)
        self.num_written = 0
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._write_forever, name="dsv4-usage", daemon=True)
        self._thread.start()

    def add(self, record: UsageRecord) -> None:
        """Queues a record; never blocks and never raises. Drops it if too many wait or the ledger is closed."""
        try:
            if self._closing.is_set():
                raise queue.Full
            self._waiting.put_nowait(record)
        except queue.Full:
            self._drop(1, "the usage database is too slow or gone: usage records are dropped")

    def totals(self, api_key: str) -> tuple[int, float]:
        """Number of recorded requests of a masked key, and their cost in USD. Errors are the database's. Slow."""
        sql = f"SELECT COUNT(*), COALESCE(SUM(cost_usd), 0) FROM {TABLE} WHERE api_key = :api_key"
        ((count, cost),) = self._store.read(sql, {"api_key": api_key})
        return int(count), float(cost)

    def close(self, seconds: float = 5.0) -> None:
        """Writes what waits, for about `seconds` at most; the rest counts as dropped. Further calls do nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._drop(self._waiting.qsize(), "the usage database did not answer in time")
        else:
            self._store.close()
        if self.num_dropped:
            logger.warning("%d usage records were dropped, %d written", self.num_dropped, self.num_written)

    def _write_forever(self) -> None:
        while True:
            if batch := self._next_batch():
                if not self._write(batch):
                    self._drop(len(batch), "usage records could not be written before the end")
            elif self._closing.is_set():
                return

    def _next_batch(self) -> list[UsageRecord]:
        """Records that wait, after a short wait for the first."""
        batch: list[UsageRecord] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._waiting.get(timeout=_PATIENCE_SECONDS))
            while len(batch) < _BATCH:
                batch.append(self._waiting.get_nowait())
        return batch

    def _write(self, batch: Sequence[UsageRecord]) -> bool:
        """Writes a batch, however often it takes; False if that fails while the ledger is closing."""
        for pause in itertools.chain(_RETRY_SECONDS, itertools.repeat(_RETRY_SECONDS[-1])):
            last = self._closing.is_set()
            try:
                insert(self._store, batch)
            except Exception as error:  # each database has errors of its own; none may end this thread
                self._log.warn(f"usage records cannot be written and wait: {error}")
                if last:
                    return False
                self._closing.wait(pause)
            else:
                self.num_written += len(batch)
                return True
        return False

    def _drop(self, count: int, reason: str) -> None:
        with self._counting:
            self.num_dropped += count
        if count:
            self._log.warn(f"{reason} ({self.num_dropped} so far)")
