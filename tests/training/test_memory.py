"""Settings of the C library's allocator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from dsv4.cli import main
from dsv4.training.memory import TUNABLES, merging_blocks


def test_small_blocks_are_merged_unless_the_user_says_how_many_are_kept() -> None:
    assert merging_blocks({"HOME": "/root"}) == {"HOME": "/root", TUNABLES: "glibc.malloc.tcache_count=0"}
    found = merging_blocks({TUNABLES: "glibc.malloc.perturb=3"})
    assert found is not None and found[TUNABLES] == "glibc.malloc.perturb=3:glibc.malloc.tcache_count=0"
    assert merging_blocks(found) is None
    assert merging_blocks({TUNABLES: "glibc.malloc.tcache_count=4"}) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_a_process_starts_anew_once_with_its_own_command_line() -> None:
    code = (
        "import os, sys; from dsv4.training.memory import restart_merging_blocks; print('begins', flush=True); "
        "restart_merging_blocks(); print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], input())"
    )
    command = [sys.executable, "-c", code, "train", "a b"]
    done = subprocess.run(command, input="word", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["begins", "begins", "glibc.malloc.tcache_count=0 ['train', 'a b'] word"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_the_train_command_starts_anew_unless_it_is_called_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr("os.execve", lambda path, words, environment: found.append(environment[TUNABLES]))
    monkeypatch.delenv(TUNABLES, raising=False)
    assert main(["train", "nobody"]) == 2 and not found
    monkeypatch.setattr(sys, "argv", ["dsv4", "train", "nobody"])
    assert main(["train", "nobody"]) == 2 and found == ["glibc.malloc.tcache_count=0"]
