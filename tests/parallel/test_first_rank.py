"""Work of the first rank: the others wait for it, however long it takes, and get its results or its error."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import run_ranks

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, time
import torch.distributed as dist
from dsv4.parallel.first_rank import on_first_rank
from dsv4.parallel.mesh import process_group

def work(value):
    assert os.environ["RANK"] == "0"
    time.sleep(0.2)  # the other waits
    return value

found = []
for number in range(3):
    found.append(on_first_rank(f"work {number}", lambda: work(list(range(200_000 + number)))))
with process_group():
    dist.barrier()
    print([len(one) for one in found], end="")
"""


@pytest.mark.slow
def test_ranks_without_torchrun_get_the_first_ones_results() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=os.environ | place | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ends = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [said for said, _ in ends] == ["[200000, 200001, 200002]"] * 2, [error[-1500:] for _, error in ends]


@pytest.mark.slow
def test_ranks_wait_longer_for_the_first_than_collectives_do(tmp_path: Path) -> None:
    """As it takes a state over, and as it merges adapters and writes the model folder."""
    assert run_ranks("patient_ranks", "begin_and_export", 2, tmp_path) == [True, True]


@pytest.mark.slow
def test_an_error_of_the_first_rank_at_the_end_is_that_of_all(tmp_path: Path) -> None:
    words = "model: tensor 'embed.weight': expected room; found none"
    ends = [("CheckpointError", words), ("FirstRankError", f"rank 0 stopped: {words}")]
    assert run_ranks("patient_ranks", "fail_to_export", 2, tmp_path) == ends
