"""Prefixes from the disk are those stored; whatever has happened to the files, they are never others."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import struct
from pathlib import Path

import pytest
import torch

from dsv4.cache.disk import DiskCache, least_bytes, records, writer
from dsv4.cache.disk.index import StoredState
from dsv4.cache.disk.records import Place
from dsv4.cache.state import Snapshot

from .prefixes import bytes_on_disk, check, check_loaded, fill, find, keys_of, new_cache, open_disk, store

LENGTHS = (128, 129, 131, 132, 133, 255, 256, 257, 300)


def payload_files(path: Path) -> list[Path]:
    return sorted((path / "v1" / "entries").iterdir())


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, *LENGTHS])
def test_a_prefix_comes_back_as_it_was(tmp_path: Path, length: int) -> None:
    with_state = open_disk(tmp_path)
    store(with_state, 5, length)
    with_state.close()
    again = open_disk(tmp_path)
    assert check(again, 5, length) == length == check(again, 5, length + 500, first=length // 256)
    assert check(again, 5, length - 1) == 0, "a state after more tokens than are asked for"
    assert check(again, 6, length) == 0
    assert again.stats.kv_offload_load_bytes > 0 == again.stats.kv_offload_store_bytes
    again.close()


@pytest.mark.parametrize("replay", [0, 128, 256])
def test_without_states_the_last_tokens_are_to_be_replayed(tmp_path: Path, replay: int) -> None:
    disk = open_disk(tmp_path, replay=replay)
    store(disk, 5, 700, state=False)
    disk.flush()
    match = find(disk, 5, 1000)
    assert match is not None and (match.common, match.length, match.state) == (640, 640 - replay, None)
    assert check(disk, 5, 1000) == 640 - replay
    store(disk, 5, 600)
    disk.flush()
    assert check(disk, 5, 1000) == max(600, 640 - replay), "whichever is longer"
    disk.close()


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    disk, other = open_disk(tmp_path), open_disk(tmp_path)
    store(disk, 1, 300)
    disk.flush()
    written = disk.stats.kv_offload_store_bytes
    for again in (disk, other):
        store(again, 1, 300)
        again.flush()
    assert disk.stats.kv_offload_store_bytes == written and other.stats.kv_offload_store_bytes == 0
    store(other, 1, 400)  # one block more, and a state
    other.flush()
    assert 0 < other.stats.kv_offload_store_bytes < written
    assert check(disk, 1, 400) == 400 and check(disk, 1, 399) == 300
    disk.close()
    other.close()


@pytest.mark.parametrize("length", [300, 256])
def test_a_state_with_the_mtp_blocks_is_stored_beside_one_without(tmp_path: Path, length: int) -> None:
    disk = open_disk(tmp_path)
    pages, without = fill(disk.cache, 1, length)
    complete = Snapshot(length, without.layers, torch.full((2, 3), 1 + length / 4096))
    written: list[int] = []
    for snapshot in (without, without, complete, complete, without):
        disk.store(keys_of(disk, 1), length, pages, snapshot)
        disk.flush()
        written.append(disk.stats.num_writes)
        match = find(disk, 1, length + 10)
        assert match is not None and match.length == length
        loaded = disk.load(match, 0)
        assert loaded is not None and loaded.snapshot is not None
        assert (loaded.snapshot.mtp_streams is not None) == (written[-1] > 1)
        check_loaded(disk, 1, match, loaded)
    assert written == [1, 1, 2, 2, 2], "once each, and none that has less"
    disk.close()


def test_salts_and_models_share_nothing(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300, salt="a")
    disk.flush()
    assert [find(disk, 1, 300, salt) is not None for salt in (None, "a", "b")] == [False, True, False]
    foreign = open_disk(tmp_path, identity=b"another model")
    assert find(foreign, 1, 300, "a") is None
    disk.close()
    foreign.close()


def test_a_flipped_byte_is_a_miss_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = open_disk(tmp_path / "sound")
    store(disk, 1, 300)
    disk.close()
    (file,) = payload_files(tmp_path / "sound")
    size = file.stat().st_size
    for place in [*range(0, 120, 7), *range(120, size, size // 40), size - 1]:
        broken = tmp_path / f"broken{place}"
        shutil.copytree(tmp_path / "sound", broken)
        (victim,) = payload_files(broken)
        data = bytearray(victim.read_bytes())
        data[place] ^= 1 << place % 8
        victim.write_bytes(data)
        caplog.clear()
        reader = open_disk(broken)
        assert check(reader, 1, 300) == 0 and len(caplog.records) == 1
        assert str(victim) in caplog.text and reader.stats.num_damaged_files == 1
        reader.flush()
        assert not victim.exists(), "it is not met again"
        store(reader, 1, 300)
        reader.flush()
        assert check(reader, 1, 300) == 300
        reader.close()
        shutil.rmtree(broken)


@pytest.mark.parametrize("size", [0, 1, 50, 95, 96, 97, 1000])
def test_a_file_that_is_cut_is_a_miss(tmp_path: Path, size: int) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    disk.flush()
    (file,) = payload_files(tmp_path)
    file.write_bytes(file.read_bytes()[:size])
    assert check(disk, 1, 300) == 0
    disk.close()


def test_another_prefix_under_a_files_name_is_a_miss(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    for number in (1, 2):
        store(disk, number, 300)
        disk.flush()
    one, two = payload_files(tmp_path)
    one.write_bytes(two.read_bytes())
    assert sorted(check(disk, number, 300) for number in (1, 2)) == [0, 300]
    disk.close()


def test_a_file_that_is_gone_is_a_miss_and_leaves_the_index(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    disk.flush()
    payload_files(tmp_path)[0].unlink()
    assert check(disk, 1, 300) == 0
    disk.flush()
    assert find(disk, 1, 300) is None
    disk.close()


def damage(index: Path, how: str) -> None:
    if how == "garbage":
        index.write_bytes(b"no index at all " * 512)
    elif how == "cut":
        index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    elif how == "empty":
        index.write_bytes(b"")
    elif how == "pages":
        data = bytearray(index.read_bytes())
        data[4096:] = bytes(len(data) - 4096)
        index.write_bytes(data)
    elif how == "header":
        index.write_bytes(b"\0" * 100 + index.read_bytes()[100:])
    else:
        index.unlink()
        with sqlite3.connect(index) as db:
            db.execute("CREATE TABLE blocks (something TEXT)")
        db.close()


@pytest.mark.parametrize("how", ["garbage", "cut", "empty", "pages", "header", "foreign"])
@pytest.mark.parametrize("running", [False, True])
def test_a_damaged_index_is_a_miss_and_begins_anew(
    tmp_path: Path, how: str, running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    disk = open_disk(tmp_path)
    for number in range(20):
        store(disk, number, 300)
    disk.flush()
    if not running:
        disk.close()
    (index,) = (tmp_path / "v1").glob("index.*.sqlite")
    damage(index, how)
    caplog.clear()
    reader = disk if running else open_disk(tmp_path)
    found = [check(reader, number, 300) for number in range(20)]
    assert set(found) <= {0, 300}
    reader.flush()
    for _ in range(3):  # meets the damage, if the look-up has not
        store(reader, 50, 300)
        reader.flush()
        check(reader, 50, 300)
    assert check(reader, 50, 300) == 300 or (running and how != "foreign")
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 2
    reader.close()
    after = open_disk(tmp_path)
    after.flush()
    assert check(after, 50, 300) in (0, 300)
    store(after, 51, 300)
    after.flush()
    assert check(after, 51, 300) == 300
    after.close()


def test_bytes_stay_within_the_budget_of_all_and_the_oldest_go_first(tmp_path: Path) -> None:
    probe = open_disk(tmp_path / "probe")
    store(probe, 0, 300)
    probe.close()
    budget = 600_000 + 5 * payload_files(tmp_path / "probe")[0].stat().st_size
    disks = [open_disk(tmp_path / "cache", max_bytes=budget) for _ in range(2)]
    for number in range(1, 120):
        disk = disks[number % 2]
        store(disk, number, 300)
        disk.flush()
        assert bytes_on_disk(tmp_path / "cache") <= budget
        assert check(disk, 1, 300) == 300, "used all the time"
        disk.flush()
    assert check(disks[0], 119, 300) == check(disks[1], 119, 300) == 300
    assert check(disks[0], 2, 300) == 0
    assert sum(disk.stats.num_evicted_files for disk in disks) > 50
    for disk in disks:
        disk.close()


def test_of_one_prefix_the_end_goes_first(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    for length in range(256, 2561, 256):
        store(disk, 1, length)
    disk.flush()
    disk.close()
    budget = bytes_on_disk(tmp_path) * 2 // 3
    small = open_disk(tmp_path, max_bytes=budget)
    small.flush()
    assert 256 <= check(small, 1, 2560) < 2560
    small.close()


@pytest.mark.parametrize("over_least", [-1_000_000, 0])
def test_a_prefix_larger_than_the_budget_is_not_stored_with_one_line(
    tmp_path: Path, over_least: int, caplog: pytest.LogCaptureFixture
) -> None:
    budget = max(10_000, least_bytes(new_cache()) + over_least)
    disk = open_disk(tmp_path, max_bytes=budget)
    for number in (1, 2, 3):
        store(disk, number, 64 * 128)
        disk.flush()
        assert check(disk, number, 64 * 128) == 0
    assert disk.stats.num_dropped_writes == 3 and not payload_files(tmp_path)
    (record,) = caplog.records
    assert f"does not fit into a budget of {budget} bytes" in record.getMessage()
    disk.close()


@pytest.mark.parametrize("more", [0, 50_000, 150_000, 1_000_000])
def test_a_small_budget_is_kept_and_used(tmp_path: Path, more: int) -> None:
    """The write-ahead log takes no place that a file could have, and does not grow past the budget."""
    budget = least_bytes(new_cache()) + more
    disk = open_disk(tmp_path, max_bytes=budget)
    for number in range(60):
        store(disk, number, 200)
        disk.flush()
        assert bytes_on_disk(tmp_path) <= budget
        assert check(disk, number, 200) == 200, "the last one is always there"
        disk.flush()
        assert bytes_on_disk(tmp_path) <= budget
    assert disk.stats.num_writes == 60 and disk.stats.num_dropped_writes == 0
    disk.close()


def test_a_full_disk_ends_storing_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    disk.flush()
    with monkeypatch.context() as full:

        def no_room(*_: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(records.os, "fsync", no_room)
        for number in (2, 3, 4):
            store(disk, number, 300)
            disk.flush()
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()] == [
        f"disk cache {tmp_path / 'v1'}: nothing more is stored: OSError: [Errno 28] No space left on device"
    ]
    assert check(disk, 1, 300) == 300 and len(payload_files(tmp_path)) == 1
    disk.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    disk = open_disk(tmp_path / "file" / "cache")
    disk.flush()
    for number in range(3):
        store(disk, number, 300)
        assert check(disk, number, 300) == 0
    disk.close()
    assert len(caplog.records) == 1 and "nothing more is stored" in caplog.text


def test_a_full_queue_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_PENDING_JOBS", 3)
    disk = open_disk(tmp_path)
    disk.flush()
    with disk.folder.lock():
        for number in range(10):
            store(disk, number, 300)
        assert disk.stats.num_dropped_writes >= 6
    disk.close()
    assert 3 <= disk.stats.num_writes <= 4


def test_a_busy_folder_drops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_disk(tmp_path)
    disk.flush()
    lock = type(disk.folder).lock
    monkeypatch.setattr(type(disk.folder), "lock", lambda self, seconds=0.05: lock(self, seconds))
    with lock(disk.folder, 5.0):
        store(disk, 1, 300)
        disk.flush()
    assert disk.stats.num_dropped_writes == 1 and check(disk, 1, 300) == 0
    store(disk, 1, 300)
    disk.flush()
    assert check(disk, 1, 300) == 300
    disk.close()


def test_leftovers_of_dead_writers_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    disk.close()
    entries = tmp_path / "v1" / "entries"
    for name in ("0000000000000001.kv", "0000000000000002.tmp", "notes.txt"):
        (entries / name).write_bytes(b"half")
    (tmp_path / "mine").write_text("stays")
    again = open_disk(tmp_path)
    again.flush()
    assert check(again, 1, 300) == 300
    again.close()
    assert {path.suffix for path in payload_files(tmp_path)} == {".kv", ".txt"} and len(payload_files(tmp_path)) == 2
    assert (tmp_path / "mine").exists()


def test_a_page_holds_nothing_of_a_former_sequence(tmp_path: Path) -> None:
    """The tail's page is stored up to its last entry."""
    cache = new_cache()
    disk = open_disk(tmp_path, cache)
    fill(cache, 9, 300)
    store(disk, 1, 130)
    disk.flush()
    assert check(disk, 1, 130) == 130
    assert keys_of(disk, 1).blocks(130) == keys_of(disk, 1).blocks(255)
    disk.close()


def test_states_of_other_sequences_make_no_look_up_longer(tmp_path: Path) -> None:
    """Counted in steps of SQLite's machine: ten thousand short sequences, whose states all hang at the root."""
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    store(disk, 2, 50)
    disk.flush()
    root = keys_of(disk, 1).at(0)
    steps = [_steps_of_look_ups(disk)]
    index = disk.folder.open_index()
    numbers = iter(range(100_000, 200_000))
    for _ in range(2):
        states = [StoredState(root, struct.pack("<ii", 3, next(numbers)), Place(1, 0, 1)) for _ in range(10_000)]
        index.add(next(numbers), 1, 0, {}, states)
        steps.append(_steps_of_look_ups(disk))
    index.close()
    assert max(steps) <= steps[0] + 200
    disk.close()


def _steps_of_look_ups(disk: DiskCache) -> int:
    assert disk._index is not None or find(disk, 1, 300) is not None
    assert disk._index is not None
    steps: list[None] = []
    disk._index._db.set_progress_handler(lambda: steps.append(None), 1)
    for number, count, length in ((1, 1000, 300), (2, 50, 50), (2, 49, 0), (1, 120, 0)):
        match = find(disk, number, count)
        assert (0 if match is None else match.length) == length
    disk._index._db.set_progress_handler(None, 1)
    return len(steps)
