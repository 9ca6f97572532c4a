"""The ledger and its sums, in SQLite and in PostgreSQL alike."""

from __future__ import annotations

import csv
import io
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsv4.usage.ledger import Ledger
from dsv4.usage.records import masked, plain
from dsv4.usage.report import UsageSum, summarize, summarize_as, total, write_records
from dsv4.usage.store import SqliteStore, insert, open_store, read_records
from tests.usage.conftest import record


def test_records_come_back_as_written_and_once(place: str) -> None:
    user = plain("Ünï\0\ud800 'quoted'; DROP")
    written = [
        record(request_id="r2", time="2026-11-03T00:00:00.001Z", user_id=user, cost_usd=None),
        record(request_id="r1", prompt_tokens=2**40),
    ]
    store = open_store(place)
    insert(store, written)
    insert(store, written)
    assert list(read_records(store)) == [written[1], written[0]]
    assert list(read_records(store, since="2026-11-03", until="2026-11-04")) == [written[0]]
    store.close()
    again = open_store(place, create=False)
    assert len(list(read_records(again))) == 2
    again.close()


def test_sums_by_group(place: str) -> None:
    store = open_store(place)
    insert(
        store,
        [
            record(request_id="1"),
            record(request_id="2", user_id="bob", api_key="", time="2026-11-03T05:00:00.000Z"),
            record(request_id="3", model="nano", cost_usd=None, finish_reason="cancelled"),
        ],
    )
    everything = ("", "~")
    assert [row.group for row in summarize(store, "day", *everything)] == ["2026-11-02", "2026-11-03"]
    assert [row.group for row in summarize(store, "key", *everything)] == ["", "****1234#00000000"]
    ann, bob = summarize(store, "user", *everything)
    assert ann == UsageSum("ann", 2, 1, 2000, 1200, 800, 200, 60, 3.0, 0.25, 1)
    assert bob == UsageSum("bob", 1, 0, 1000, 600, 400, 100, 30, 1.5, 0.25, 0)
    assert total([ann, bob]) == UsageSum("total", 3, 1, 3000, 1800, 1200, 300, 90, 4.5, 0.5, 1)
    assert [row.group for row in summarize(store, "model", "2026-11-03", "~")] == ["deepseek-v4-pro"]
    off_peak, peak = summarize_as(store, "deepseek-v4-flash", "day", *everything)
    assert off_peak.cost_usd == pytest.approx(2 * (600 * 0.003 + 400 * 0.15 + 100 * 0.60) / 1e6)
    assert peak.cost_usd == pytest.approx((600 * 0.003 + 400 * 0.15 + 100 * 0.60) / 1e6)
    assert off_peak.unpriced == 0
    store.close()


def test_a_ledger_writes_and_sums_up(place: str) -> None:
    ledger = Ledger(open_store(place))
    threads = [
        threading.Thread(target=lambda t=t: [ledger.add(record(request_id=f"{t}-{i}")) for i in range(200)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 60
    while ledger.num_written < 800 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ledger.totals("****1234#00000000") == (800, pytest.approx(200.0))
    assert ledger.totals("nobody") == (0, 0.0)
    ledger.close()
    assert (ledger.num_written, ledger.num_dropped) == (800, 0)


class SlowStore:
    """A store whose writes wait for `gate`."""

    def __init__(self, path: Path) -> None:
        self.inner = SqliteStore(path, create=True)
        self.gate = threading.Event()

    def write(self, sql: str, rows: Any = ()) -> None:
        self.gate.wait(60)
        self.inner.write(sql, rows)

    def read(self, sql: str, values: Any) -> Any:
        return self.inner.read(sql, values)

    def close(self) -> None:
        self.inner.close()


def test_closing_writes_what_waits(sqlite_place: str) -> None:
    open_store(sqlite_place)
    store = SlowStore(Path(sqlite_place))
    ledger = Ledger(store)
    for i in range(1200):
        ledger.add(record(request_id=str(i)))
    threading.Timer(0.3, store.gate.set).start()
    ledger.close(seconds=60)
    assert (ledger.num_written, ledger.num_dropped) == (1200, 0)
    ledger.add(record(request_id="late"))
    ledger.close()
    assert (len(list(read_records(store.inner))), ledger.num_dropped) == (1200, 1)  # type: ignore[arg-type]


def test_a_stuck_database_blocks_neither_adding_nor_closing(sqlite_place: str) -> None:
    store = SlowStore(Path(sqlite_place))
    ledger = Ledger(store, capacity=5)
    start = time.monotonic()
    for i in range(1000):
        ledger.add(record(request_id=str(i)))
    ledger.close(seconds=0.2)
    assert time.monotonic() - start < 5
    assert ledger.num_written == 0 and ledger.num_dropped >= 990
    store.gate.set()


def test_a_database_that_cannot_be_used_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no.db does not exist; dsv4 serve --usage-db"):
        open_store(str(tmp_path / "no.db"), create=False)
    with pytest.raises(ValueError, match="cannot be used: unable to open database file"):
        open_store(str(tmp_path / "missing" / "usage.db"))
    (tmp_path / "text.db").write_text("this is no database, whatever its name says")
    with pytest.raises(ValueError, match="text.db cannot be used: file is not a database"):
        open_store(str(tmp_path / "text.db"))
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE things (name TEXT)")
    other.close()
    with pytest.raises(ValueError, match="no such table: dsv4_usage"):
        open_store(str(tmp_path / "other.db"), create=False)


def test_an_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match="usage database 127.0.0.1:1/x cannot be used") as caught:
        open_store("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="of the kind 'what'; allowed: the path of an SQLite file, or a URL"):
        open_store("what://host/name")
    with pytest.raises(ValueError, match="is no URL"):
        open_store("://")


def test_keys_are_told_apart_but_not_shown() -> None:
    key = "sk-0123456789abcdef-wxyz"
    assert masked(key).startswith("****wxyz#") and masked(key) != masked(key + "wxyz")
    assert masked("short-key").startswith("****#") and masked(None) == masked("") == ""


def test_spreadsheets_compute_nothing() -> None:
    file = io.StringIO()
    write_records(file, [record(user_id="=1+1", cost_usd=2e-9, seconds=0.0)])
    (row,) = csv.DictReader(io.StringIO(file.getvalue()))
    assert (row["user_id"], row["cost_usd"], row["seconds"]) == ("'=1+1", "0.000000002", "0")
