"""Forks writers of a disk cache and kills each at a random moment: python -m ... FOLDER KILLS SEED.

A process of its own, which has imported torch and has no other threads: a fork then takes a millisecond.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import dsv4  # before torch: it pins MKL's rounding mode

import torch  # isort: skip

from tests.cache.disk.prefixes import open_disk, store

NUMBERS = 8  # sequences
LENGTHS = (128, 130, 256, 300, 516, 700, 1024, 1030)


def write(folder: Path, seed: int) -> None:
    """Stores sequences for ever, in a folder too small for all of them."""
    r = random.Random(seed)
    disk = open_disk(folder, max_bytes=1_500_000)
    while True:
        store(disk, r.randrange(NUMBERS), r.choice(LENGTHS), state=r.random() < 0.7)
        if r.random() < 0.5:
            disk.flush()


def main(folder: Path, kills: int, seed: int) -> None:
    assert dsv4.__version__
    torch.set_num_threads(1)
    r = random.Random(seed)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            write(folder, seed * 100_000 + number)
        time.sleep(r.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(number, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
