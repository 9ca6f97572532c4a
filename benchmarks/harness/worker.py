"""One contender's process: reads a JSON request per line from stdin, answers each with a JSON line.

write     {config, folder, seed, kind}    a folder of random weights: "fp32", "official", or "codes" if not there yet
convert   {source, target, linears}       a folder for transformers, or a GGUF where `linears` says how
load      {folder, numerics}              -> settings
logits    {ids, prompt, file}             prompt tokens at once, the rest one by one; rows to a .npy file
prefill   {length, seed}                  -> seconds, peak_bytes
decode_at {depth, steps, seed}            -> seconds of the steps alone, peak_bytes; a depth is read once and kept
begin     {max_tokens}                    an empty sequence
feed      {length, seed}                  -> seconds of random tokens more, peak_bytes
decode_on {steps, seed}                   -> seconds of the steps, which are then taken back
cache     {}                              -> element_bytes of dsv4's cache
ceilings  {megabytes, size}               -> see machine.py
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

from benchmarks.harness.machine import measure_ceilings
from benchmarks.harness.peers import MAKERS, Dsv4Peer, Peer
from benchmarks.harness.random_checkpoint import write_random_checkpoint, write_random_values

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
        self._held: dict[int, Any] = {}  # depth -> the sequence that decode_at goes back to

    def write(self, config: Request, folder: str, seed: int, kind: Any) -> Request:
        from dsv4.config import ModelConfig

        shape = ModelConfig.from_dict(config)
        if kind == "codes":
            write_random_checkpoint(shape, Path(folder), seed)
        else:
            write_random_values(shape, Path(folder), seed, kind)
        return {}

    def convert(self, source: str, target: str, linears: Any = None) -> Request:
        if linears is not None:
            from dsv4.checkpoint.gguf_export import export_gguf

            Path(target).parent.mkdir(parents=True, exist_ok=True)
            export_gguf(source, target, linears=linears, overwrite=True)
        else:
            from dsv4.checkpoint import convert

            convert(source, target, "transformers", overwrite=True)
        return {}

    def load(self, folder: str, numerics: str = "float") -> Request:
        self.peer = MAKERS[self.name](Path(folder), numerics)
        self.vocab_size = int(json.loads((Path(folder) / "config.json").read_text())["vocab_size"])
        settings = {**self.peer.settings, "torch": torch.__version__, "threads": torch.get_num_threads()}
        return {"settings": {**settings, "mkl_cbwr": os.environ.get("MKL_CBWR")}}

    def logits(self, ids: list[int], prompt: int, file: str) -> Request:
        self.peer.begin(len(ids))
        rows = [self.peer.extend(ids[:prompt])]
        rows += [self.peer.extend([token]) for token in ids[prompt:]]
        np.save(file, torch.stack(rows).numpy())
        return {}

    def prefill(self, length: int, seed: int) -> Request:
        self.peer.begin(length)
        return self.feed(length, seed)

    def decode_at(self, depth: int, steps: int, seed: int) -> Request:
        if depth not in self._held:
            self.peer.begin(depth + steps)
            if depth:
                self.peer.extend(self._random_ids(depth, seed))
            self._held[depth] = self.peer.hold()
        self.peer.resume(self._held[depth])
        return self.decode_on(steps, seed)

    def begin(self, max_tokens: int) -> Request:
        self.peer.begin(max_tokens)
        return {}

    def feed(self, length: int, seed: int) -> Request:
        return self._timed([self._random_ids(length, seed)])

    def decode_on(self, steps: int, seed: int) -> Request:
        held = self.peer.hold()
        # Random tokens, as llama-bench takes: random weights soon repeat themselves, and with that their experts.
        answer = self._timed([[token] for token in self._random_ids(steps, seed)])
        self.peer.resume(held)
        return answer

    def cache(self) -> Request:
        assert isinstance(self.peer, Dsv4Peer)
        return {"element_bytes": self.peer.element_bytes()}

    def ceilings(self, megabytes: int, size: int) -> Request:
        return measure_ceilings(megabytes, size)

    def _random_ids(self, length: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(self.vocab_size, size=length).tolist()

    def _timed(self, pieces: list[list[int]]) -> Request:
        """Seconds of the forwards and of a greedy choice after each, the quickest way for every peer."""
        start = perf_counter()
        for ids in pieces:
            self.peer.extend(ids).numpy().argmax()
        return {"seconds": perf_counter() - start, "peak_bytes": peak_bytes()}


def main() -> None:
    # Answers keep the pipe to themselves: whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, threads, limit = sys.argv[1:4]
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    if name == "dsv4":
        import dsv4  # sets MKL's rounding mode, before the first product

        assert dsv4.__version__
    torch.set_num_threads(int(threads))
    worker = Worker(name)
    with torch.inference_mode():
        for line in sys.stdin:
            request: Request = json.loads(line)
            answers.write(json.dumps(getattr(worker, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    main()
