"""Several ranks on this machine, each a process that talks to the others over gloo."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, function: str, count: int, *arguments: object, **variables: str) -> list[Any]:
    """Results, by rank, of `function(*arguments)` of a module beside this one, in `count` processes of one group."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
        (Path(folder) / "arguments").write_bytes(pickle.dumps((f"tests.parallel.{module}", function, count, arguments)))
        command = [sys.executable, "-m", "tests.parallel.ranks", folder]
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for rank in range(count)
        ]
        try:
            errors = [rank.communicate(timeout=300)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks):
            # Others report that a peer is gone; the error that began it is one of the rest.
            first = [error for error in errors if error and "Connection closed by peer" not in error]
            raise AssertionError("\n".join(first or errors))
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(count)]


def _main(folder: Path, rank: int) -> None:
    import importlib

    import torch
    import torch.distributed as dist

    module, function, count, arguments = pickle.loads((folder / "arguments").read_bytes())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    try:
        result = getattr(importlib.import_module(module), function)(*arguments)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
