"""Within a budget the beginning of a prefix stays: every block on disk is one that a look-up reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.cache import Cache
from dsv4.cache.disk import DiskCache

from ...model.tiny import tiny_config
from .prefixes import bytes_on_disk, check, find, open_disk, store

STEP = 256  # tokens of two blocks, which are stored together
LONG = 24 * STEP
CONFIG = tiny_config(schedule=(0, 4, 4, 128), head_dim=128, qk_rope_head_dim=4, index_head_dim=32)


def open_wide(path: Path, steps: int | None = None) -> DiskCache:
    """A cache whose pages outweigh the index, with a budget for so many steps."""
    cache = Cache(CONFIG, 1, LONG, torch.device("cpu"), torch.float32)
    return open_disk(path, cache, None if steps is None else budget_for(cache, steps))


def budget_for(cache: Cache, steps: int) -> int:
    return steps * 2 * cache.page_bytes + 250_000  # of the index and its log


def reached(disk: DiskCache, number: int) -> int:
    match = find(disk, number, LONG)
    return 0 if match is None else match.common // 128


def blocks_on_disk(disk: DiskCache) -> int:
    index = disk.folder.open_index()
    (count,) = index._db.execute("SELECT count(*) FROM blocks").fetchone()
    index.close()
    return count


def test_a_prefix_longer_than_the_budget_keeps_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = open_wide(tmp_path, 12)
    budget = budget_for(disk.cache, 12)
    store(disk, 2, 3 * STEP, state=False)
    depths: list[int] = []
    for length in range(STEP, LONG + 1, STEP):
        store(disk, 1, length, state=False)
        disk.flush()
        depths.append(reached(disk, 1))
        assert bytes_on_disk(tmp_path) <= budget
        assert blocks_on_disk(disk) == depths[-1] + reached(disk, 2)
    assert depths == sorted(depths) and depths[-1] >= 24
    assert reached(disk, 2) == 0, "another prefix has given way"
    assert disk.stats.num_dropped_writes == 24 - depths[-1] // 2 > 0
    assert disk.stats.num_evicted_files <= 3
    (record,) = caplog.records
    assert f"does not fit into a budget of {budget} bytes" in record.getMessage()
    store(disk, 3, 3 * STEP, state=False)
    disk.flush()
    assert reached(disk, 3) == 6 and depths[-1] - 8 <= reached(disk, 1) < depths[-1], "the end goes for what is newer"
    disk.close()


def test_others_are_not_evicted_for_what_never_fits(tmp_path: Path) -> None:
    disk = open_wide(tmp_path, 12)
    store(disk, 2, 3 * STEP, state=False)
    store(disk, 1, 6 * STEP, state=False)
    disk.flush()
    store(disk, 1, 15 * STEP, state=False)
    disk.flush()
    assert (reached(disk, 1), reached(disk, 2)) == (12, 6)
    assert disk.stats.num_dropped_writes == 1 and disk.stats.num_evicted_files == 0
    disk.close()


def test_a_write_that_cannot_fit_copies_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_wide(tmp_path, 12)
    store(disk, 1, 6 * STEP, state=False)
    disk.flush()
    monkeypatch.setattr("dsv4.cache.disk.disk_cache.pack_pages", lambda *_: pytest.fail("pages are copied"))
    store(disk, 1, LONG, state=False)
    disk.close()
    assert disk.stats.num_dropped_writes == 1


def test_long_prefixes_of_two_processes_stay_reachable(tmp_path: Path) -> None:
    """Each evicts the other's end, under a budget for less than one of them."""
    disks = [open_wide(tmp_path, 20) for _ in range(2)]
    budget = budget_for(disks[0].cache, 20)
    for length in range(STEP, LONG + 1, STEP):
        for number, disk in enumerate(disks):
            store(disk, number, length, state=False)
            disk.flush()
            assert blocks_on_disk(disk) == sum(reached(disk, other) for other in range(2))
            assert bytes_on_disk(tmp_path) <= budget
    assert sum(reached(disks[0], other) for other in range(2)) >= 36
    assert min(disk.stats.num_evicted_files for disk in disks) > 0
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("state", [False, True])
def test_what_another_process_has_cut_off_is_not_written(tmp_path: Path, state: bool) -> None:
    """The block before a job's first one is evicted as the job waits: the rest would never be found."""
    disk = open_disk(tmp_path, replay=0)
    store(disk, 1, STEP, state=False)
    disk.flush()
    with disk.folder.lock():
        store(disk, 1, 2 * STEP, state=state)
        index = disk.folder.open_index()
        disk.folder.remove(index.evict(1))
        index.close()
    disk.flush()
    assert blocks_on_disk(disk) == 0 and not list(disk.folder.entries.iterdir())
    assert (disk.stats.num_writes, disk.stats.num_dropped_writes) == (1, 1)
    store(disk, 1, 2 * STEP, state=state)
    disk.flush()
    assert check(disk, 1, 2 * STEP) == 2 * STEP, "the next store has all of it"
    disk.close()
