"""Writers that are killed at any moment leave nothing wrong behind. DSV4_KILLS=1000 kills as many (30 by default)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .killed_writers import LENGTHS, NUMBERS
from .prefixes import bytes_on_disk, check, open_disk, store

ROOT = Path(__file__).parents[3]
KILLS = int(os.environ.get("DSV4_KILLS", "30"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.timeout(max(600, 5 * KILLS))
def test_killed_writers_leave_no_wrong_answer_and_no_file_behind(tmp_path: Path) -> None:
    """Two lines of writers, of which one each is killed after 200 ms or so, beside a reader that goes on."""
    kills = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cache.disk.killed_writers", tmp_path, str(KILLS // 2), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        for seed in (1, 2)
    ]
    reader = open_disk(tmp_path, max_bytes=1_500_000)
    hits = lookups = 0
    while any(process.poll() is None for process in kills):
        store(reader, lookups // NUMBERS % NUMBERS, 1024)
        for number in range(NUMBERS):
            hits += check(reader, number, 1030) > 0
            lookups += 1
    for process in kills:
        assert process.stdout is not None and process.returncode == 0
        assert len(process.stdout.read().split()) == KILLS // 2
        process.stdout.close()
    assert hits > 0 and reader.stats.num_damaged_files == 0, "a file has its name only when it is whole"
    reader.close()
    after = open_disk(tmp_path, max_bytes=1_500_000)
    for number in range(NUMBERS):
        store(after, number, max(LENGTHS))
        after.flush()
        assert check(after, number, max(LENGTHS)) == max(LENGTHS)
    after.close()
    files = {path.name for path in (tmp_path / "v1" / "entries").iterdir()}
    index = after.folder.open_index()
    assert files == {after.folder.file(number).name for number in index.files()}, "no leftover, and nothing lost"
    index.check()
    index.close()
    assert bytes_on_disk(tmp_path) <= 1_500_000
    print(f"{KILLS} kills, {lookups} look-ups, {hits} hits, {len(files)} files at the end")
