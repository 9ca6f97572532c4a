"""What fails between the threads and the processes of a disk cache costs what it must, and nothing for good."""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.cache.disk import index, reading, writer
from dsv4.cache.disk.disk_cache import DiskCache
from dsv4.cache.disk.reading import Reader

from .prefixes import check, find, keys_of, open_disk, store


def zeroed(path: Path) -> DiskCache:
    """A cache in which sequence 1 is damaged."""
    disk = open_disk(path)
    store(disk, 1, 300)
    disk.close()
    for file in entries(path):
        file.write_bytes(bytes(file.stat().st_size))
    disk = open_disk(path)
    disk.flush()
    return disk


def entries(path: Path) -> list[Path]:
    return list((path / "v1" / "entries").iterdir())


@pytest.mark.parametrize("how", ["full queue", "busy folder", "stored meanwhile"])
def test_a_damaged_file_is_stored_anew_though_the_writer_had_no_turn(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = zeroed(tmp_path)
    lock, submit = type(disk.folder).lock, disk._writer.submit
    if how == "full queue":
        with monkeypatch.context() as small, disk.folder.lock():
            small.setattr(writer, "MAX_PENDING_JOBS", 3)
            for number in range(10, 20):
                store(disk, number, 300)
            assert check(disk, 1, 300) == 0
    elif how == "busy folder":
        with monkeypatch.context() as busy, lock(disk.folder):
            busy.setattr(type(disk.folder), "lock", lambda self, seconds=0.05: lock(self, seconds))
            assert check(disk, 1, 300) == 0
            disk.flush()
    else:

        def stored_before(job: writer.WriteJob) -> None:
            disk._writer.submit = submit
            store(disk, 1, 300)
            submit(job)

        monkeypatch.setattr(disk._writer, "submit", stored_before)
        assert check(disk, 1, 300) == 0
    disk.flush()
    store(disk, 1, 300)
    disk.flush()
    assert check(disk, 1, 300) == 300
    disk.close()


def test_a_shorter_state_is_found_where_the_longest_is_lost(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 290)
    disk.flush()
    (before,) = entries(tmp_path)
    store(disk, 1, 300)
    disk.flush()
    (longest,) = (file for file in entries(tmp_path) if file != before)
    longest.write_bytes(bytes(longest.stat().st_size))
    with disk.folder.lock():  # the index has it still
        assert check(disk, 1, 300) == 0
        assert check(disk, 1, 300) == 290
    disk.close()


def test_an_error_of_the_moment_removes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    disk.flush()

    def too_many(path: Any, *rest: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", too_many)
        assert check(disk, 1, 300) == 0
    disk.flush()
    assert (check(disk, 1, 300), disk.stats.num_damaged_files) == (300, 0)
    disk.close()


def test_a_file_that_the_index_cannot_take_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WRITER_SECONDS", 0.05)
    disk = open_disk(tmp_path)
    disk.flush()
    path = disk.folder.index_path()
    assert path is not None
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store(disk, 1, 300)
    disk.flush()
    assert entries(tmp_path) == [] and disk.stats.num_dropped_writes == 1
    other.execute("ROLLBACK")
    other.close()
    store(disk, 1, 300)
    disk.flush()
    assert check(disk, 1, 300) == 300
    disk.close()


def test_distrusted_prefixes_are_forgotten_and_what_waits_is_dropped(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    for number in (1, 2):
        store(disk, number, 300)
    disk.flush()
    with disk.folder.lock():
        store(disk, 3, 300)
        while disk._writer._jobs:  # until it is in the writer's hands
            time.sleep(0.001)
        store(disk, 4, 300)
        disk.distrust([(keys_of(disk, 1), 300), (keys_of(disk, 3), 300)])
        assert check(disk, 1, 300) == 0, "not even before it is removed"
    disk.flush()
    assert [check(disk, number, 300) for number in (1, 2, 3)] == [0, 300, 0]
    store(disk, 1, 300)
    disk.flush()
    assert check(disk, 1, 300) == 300
    disk.close()


def test_a_fork_keeps_no_lock_and_closes_at_once(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    disk.flush()
    go, end = os.pipe(), os.pipe()
    with disk.folder.lock():
        store(disk, 1, 300)  # the writer is busy
        child = os.fork()
        if child == 0:
            os.read(go[0], 1)
            disk.close()  # waits for no thread of the other process
            os.write(end[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
    try:
        disk.flush()
        assert check(disk, 1, 300) == 300, "the child holds no lock"
        os.write(go[1], b"x")
        assert os.read(end[0], 1) == b"x"
    finally:
        os.write(go[1], b"xx")
        os.waitpid(child, 0)
    disk.close()


def test_a_writer_that_ends_itself_does_not_wait_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_disk(tmp_path)
    disk.flush()
    write, ended = disk._writer._write, threading.Event()

    def collecting(job: writer.WriteJob) -> None:
        write(job)
        disk.close()  # as a garbage collection in this thread does
        ended.set()

    monkeypatch.setattr(disk._writer, "_write", collecting)
    store(disk, 1, 300)
    assert ended.wait(30)
    disk._writer._thread.join(30)
    assert not disk._writer.off and disk.stats.num_writes == 1


def test_closing_waits_once_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, waited = open_disk(tmp_path), list[float]()
    disk.flush()
    thread = disk._writer._thread
    with disk.folder.lock():
        store(disk, 1, 300)
        monkeypatch.setattr(thread, "join", waited.append)
        disk._writer.close(0.05)
    monkeypatch.undo()
    thread.join(30)
    assert waited == [0.0]


def test_no_threads_pile_up_before_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WAIT_SECONDS", 0.0)
    disk, go, begun = open_disk(tmp_path), threading.Event(), threading.Event()
    store(disk, 1, 300)
    disk.flush()
    match = find(disk, 1, 300)
    assert match is not None
    load = disk.load

    def stuck(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(120)
        return load(*arguments)

    monkeypatch.setattr(disk, "load", stuck)
    reader = Reader(disk)
    first = reader.start(match, 0)
    assert begun.wait(30)
    first.deadline = 0.0
    late = [reader.start(match, 0) for _ in range(20)]
    assert all(one.done and one.loaded is None for one in late)
    go.set()
    while not first.done:
        reader.wait(1.0)
    again = reader.start(match, 0)
    while not again.done:
        reader.wait(1.0)
    assert again.loaded is not None
    disk.close()


@pytest.fixture
def folder_for_all() -> Iterator[Path]:
    """A folder that other users can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="a reader of another user needs root")
def test_a_reader_without_leave_to_write_sees_what_is_new(folder_for_all: Path) -> None:
    disk = open_disk(folder_for_all)
    store(disk, 1, 300)
    disk.close()
    asks, answers = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        reader = open_disk(folder_for_all)
        while os.read(asks[0], 1) == b"x":
            os.write(answers[1], bytes(check(reader, number, 300) > 0 for number in (1, 2)))
        os._exit(0)

    def found() -> list[bool]:
        os.write(asks[1], b"x")
        return [bool(one) for one in os.read(answers[0], 2)]

    try:
        assert found() == [True, False]
        disk = open_disk(folder_for_all)
        store(disk, 2, 300)
        disk.flush()
        assert found() == [True, True]
    finally:
        os.write(asks[1], b".")
        os.waitpid(child, 0)
    disk.close()
