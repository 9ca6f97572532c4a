"""One contender's process: reads a JSON request a line from stdin, answers each with a JSON line.

write    {config, scratch, seed}                     both weight folders (dsv4's process only)
load     {folder}                                    -> settings, peak_bytes
logits   {ids, prompt, file}                         prompt tokens at once, the rest one by one; rows to a .npy file
prefill  {length, seed}                              -> seconds
decode   {prompt, steps, seed}                       -> seconds of the steps alone
memory   {}                                          -> peak_bytes of this process, so far
ceilings {megabytes, size}                           -> see ceilings.py
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.comparison.ceilings import measure_ceilings
from benchmarks.comparison.peers import MAKERS, Peer

Request = dict[str, Any]


def peak_bytes() -> int:
    """The most memory that this process ever held.

    Linux: VmHWM, not ru_maxrss, which a child inherits from the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class Worker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.peer: Peer
        self.vocab_size = 0

    def write(self, config: dict[str, Any], scratch: str, seed: int) -> Request:
        from benchmarks.comparison.weights import write_weights
        from dsv4.config import ModelConfig

        write_weights(ModelConfig.from_dict(config), Path(scratch), seed)
        return {}

    def load(self, folder: str) -> Request:
        self.peer = MAKERS[self.name](Path(folder))
        self.vocab_size = int(json.loads((Path(folder) / "config.json").read_text())["vocab_size"])
        settings = {**self.peer.settings, "torch": torch.__version__, "threads": torch.get_num_threads()}
        return {"settings": {**settings, "mkl_cbwr": os.environ.get("MKL_CBWR")}, "peak_bytes": peak_bytes()}

    def _random_ids(self, length: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(self.vocab_size, size=length).tolist()

    def logits(self, ids: list[int], prompt: int, file: str) -> Request:
        self.peer.begin(len(ids))
        rows = [self.peer.extend(ids[:prompt])]
        rows += [self.peer.extend([token]) for token in ids[prompt:]]
        np.save(file, torch.stack(rows).numpy())
        return {}

    def prefill(self, length: int, seed: int) -> Request:
        ids = self._random_ids(length, seed)
        self.peer.begin(length)
        start = perf_counter()
        token = int(self.peer.extend(ids).argmax())
        return {"seconds": perf_counter() - start, "token": token}

    def decode(self, prompt: int, steps: int, seed: int) -> Request:
        self.peer.begin(prompt + steps)
        token = int(self.peer.extend(self._random_ids(prompt, seed)).argmax())
        start = perf_counter()
        for _ in range(steps):
            token = int(self.peer.extend([token]).argmax())
        return {"seconds": perf_counter() - start}

    def memory(self) -> Request:
        return {"peak_bytes": peak_bytes()}

    def ceilings(self, megabytes: int, size: int) -> Request:
        return measure_ceilings(megabytes, size)


def main() -> None:
    # Answers keep the pipe to themselves: whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, threads = sys.argv[1], int(sys.argv[2])
    if name == "dsv4":
        import dsv4  # sets MKL's rounding mode, before the first product

        assert dsv4.__version__
    torch.set_num_threads(threads)
    worker = Worker(name)
    with torch.inference_mode():
        for line in sys.stdin:
            request: Request = json.loads(line)
            answers.write(json.dumps(getattr(worker, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    main()
