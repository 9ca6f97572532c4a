"""A writer that is killed as it replaces the index leaves two behind: one counts, the other goes."""

from __future__ import annotations

from pathlib import Path

from dsv4.cache.disk.index import Index

from .prefixes import bytes_on_disk, check, open_disk, store


def leave_two_indexes(path: Path) -> None:
    """What a writer leaves that is killed as the new index has its name and the old one is still there."""
    Index.create(path / "v1" / "new.sqlite")
    (path / "v1" / "new.sqlite").rename(path / "v1" / "index.1.sqlite")


def indexes(path: Path) -> set[str]:
    return {file.name for file in (path / "v1").glob("index.*") if file.suffix == ".sqlite"}


def test_an_index_that_was_replaced_is_removed_and_takes_no_room(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    disk.close()
    leave_two_indexes(tmp_path)
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / "v1" / f"index.0.sqlite{suffix}").write_bytes(bytes(700_000))
    (tmp_path / "v1" / "index.txt").write_text("stays")
    again = open_disk(tmp_path, max_bytes=1_000_000)
    again.flush()
    store(again, 1, 300)
    again.flush()
    assert check(again, 1, 300) == 300 and indexes(tmp_path) == {"index.1.sqlite"}
    again.close()
    assert not list((tmp_path / "v1").glob("index.0.*")) and (tmp_path / "v1" / "index.txt").exists()
    assert bytes_on_disk(tmp_path) <= 1_000_000


def test_a_running_process_goes_on_with_the_new_index(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store(disk, 1, 300)
    disk.flush()
    leave_two_indexes(tmp_path)
    store(disk, 2, 300)
    disk.flush()
    assert (check(disk, 1, 300), check(disk, 2, 300)) == (0, 300)
    assert indexes(tmp_path) == {"index.1.sqlite"}
    index = disk.folder.open_index()
    files = {disk.folder.file(number).name for number in index.files()}
    index.close()
    assert {file.name for file in disk.folder.entries.iterdir()} == files, "the old index's files are leftovers"
    disk.close()
