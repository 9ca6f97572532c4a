"""The contenders behind one question: tokens a second of a prompt, or of decoding at a depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from benchmarks.comparison.process import BenchmarkError, WorkerProcess
from benchmarks.engines.llama_bench import LlamaBench, Taken
from benchmarks.engines.plan import Plan

SEED = 1
WARM_UP = 64  # tokens of the first forward of a process, not counted


class Contender(Protocol):
    name: str  # in the rows
    group: str  # contenders of a group differ in a setting: after the first round only the faster one goes on

    def can(self, measure: str, tokens: int) -> bool:
        """Whether it is asked for this figure at all."""
        ...

    def take(self, measure: str, tokens: int, turn: int) -> Taken:
        """Measure once. BenchmarkError when it fails at that length."""
        ...


class WorkerContender:
    """dsv4 or transformers in a process that stays."""

    def __init__(self, worker: WorkerProcess, plan: Plan, numerics: str = "float") -> None:
        self.name = self.group = worker.peer if numerics == "float" else f"{worker.peer} {numerics}"
        self.worker, self.plan, self._numerics = worker, plan, numerics
        self.settings: dict[str, Any] = {}

    def load(self, folder: Path) -> None:
        self.settings = self.worker.ask("load", folder=str(folder), numerics=self._numerics)["settings"]
        self.worker.ask("prefill", length=WARM_UP, seed=SEED)
        self.worker.ask("decode", prompt=WARM_UP, steps=2, seed=SEED)

    def can(self, measure: str, tokens: int) -> bool:
        if self.worker.peer == "dsv4":
            return True
        return tokens <= self.plan.transformers_prefill if measure == "prefill" else tokens == 0

    def take(self, measure: str, tokens: int, turn: int) -> Taken:
        if measure == "prefill":
            answer, counted = self.worker.ask("prefill", length=tokens, seed=SEED + turn), tokens
        else:
            counted = self.plan.steps
            answer = self.worker.ask("decode_at", depth=tokens, steps=counted, seed=SEED + turn)
        return Taken(counted / answer["seconds"], answer["seconds"], answer["peak_bytes"])


class LlamaContender:
    """llama-bench with one GGUF and one setting of flash attention: a process for every figure."""

    def __init__(self, bench: LlamaBench, gguf: Path, linears: str, flash: bool, repack: bool, plan: Plan) -> None:
        self.group = f"llama.cpp {linears}" + ("" if repack else " repack 0")
        self.name = self.group + (" fa" if flash else "")
        self.bench, self.gguf, self.plan = bench, gguf, plan
        self._settings = {"flash": flash, "repack": repack}

    def can(self, measure: str, tokens: int) -> bool:
        return measure == "prefill" or tokens <= self.plan.llama_depth

    def take(self, measure: str, tokens: int, turn: int) -> Taken:
        if measure == "prefill":
            return self.bench.run(self.gguf, prompt=tokens, **self._settings)
        return self.bench.run(self.gguf, steps=self.plan.steps, depth=tokens, **self._settings)


def prepare(
    model: str, plan: Plan, scratch: Path, threads: int, linears: tuple[str, ...]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write what the contenders load: (folder of dsv4 and transformers, GGUF of each of `linears`), the same values.

    In a process of its own, whose memory is nobody's figure.
    """
    from dsv4.config import nano_path

    place = scratch / model
    with WorkerProcess("dsv4", threads) as worker:
        folders = {"dsv4": place / "official", "transformers": place / "transformers"}
        if model == "slice":
            config = plan.slice.to_dict()
            worker.ask("write", config=config, scratch=str(place), seed=SEED, layout="official")
        else:
            folders["dsv4"] = nano_path()
            worker.ask("convert", source=str(folders["dsv4"]), target=str(folders["transformers"]))
        ggufs = {name: place / f"{name}.gguf" for name in linears}
        for name, file in ggufs.items():
            worker.ask("convert", source=str(folders["dsv4"]), target=str(file), linears=name)
    missing = [str(file) for file in ggufs.values() if not file.is_file()]
    if missing:
        raise BenchmarkError(f"the export wrote no {', '.join(missing)}")
    return folders, ggufs
