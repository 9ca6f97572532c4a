"""The contenders behind one question: tokens per second of a prompt, or of decoding at a depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness.llama_bench import LlamaBench
from benchmarks.harness.process import BenchmarkError, WorkerProcess
from benchmarks.harness.scenarios import Scenario
from dsv4.config import nano_path

SEED = 1
WARM_UP = 64  # tokens of the first forward of a process, not counted
LINEARS = ("bf16", "q8_0")  # what FP8 linears become in a GGUF, which has no FP8


@dataclass(frozen=True)
class Sample:
    """One figure of one contender: tokens per second, seconds that it took to get, peak bytes of its process."""

    rate: float
    wall_s: float
    peak_bytes: int | None = None


class Contender(Protocol):
    name: str  # in the rows
    group: str  # contenders of a group differ in a setting: after the first round only the faster one goes on
    stays: bool  # True if one process gives all figures

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        """Measure once. BenchmarkError when it fails at that length."""
        ...


class WorkerContender:
    """dsv4 or transformers in a process that stays. "dsv4 shipped" computes in shipped numerics."""

    stays = True

    def __init__(self, name: str, process: WorkerProcess, scenario: Scenario) -> None:
        self.name = self.group = name
        self.process, self.scenario = process, scenario

    def load(self, folder: Path) -> dict[str, Any]:
        """Loads and warms up -> settings. All weights are read once: a mapped file is then in memory."""
        numerics = "shipped" if self.name.endswith(" shipped") else "float"
        settings: dict[str, Any] = self.process.ask("load", folder=str(folder), numerics=numerics)["settings"]
        self.process.ask("prefill", length=WARM_UP, seed=SEED)
        self.process.ask("begin", max_tokens=2)
        for turn in range(2):
            self.process.ask("feed", length=1, seed=turn)
        if self.scenario.weights == "codes":
            self.process.ask("prefill", length=self.scenario.prefill[-1], seed=SEED)
        return settings

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        if measure == "prefill":
            answer, counted = self.process.ask("prefill", length=tokens, seed=SEED + turn), tokens
        else:
            counted = self.scenario.steps
            answer = self.process.ask("decode_at", depth=tokens, steps=counted, seed=SEED + turn)
        return Sample(counted / answer["seconds"], answer["seconds"], answer["peak_bytes"])


class LlamaContender:
    """llama-bench with one GGUF and one setting of flash attention: a process per figure."""

    stays = False

    def __init__(
        self, bench: LlamaBench, gguf: Path, linears: str, flash: bool, repack: bool, scenario: Scenario
    ) -> None:
        self.group = f"llama.cpp {linears}" + ("" if repack else " repack 0")
        self.name = self.group + (" fa" if flash else "")
        self.bench, self.gguf, self.scenario = bench, gguf, scenario
        self._settings = {"flash": flash, "repack": repack}

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        if measure == "prefill":
            return Sample(*self.bench.run(self.gguf, prompt=tokens, **self._settings))
        return Sample(*self.bench.run(self.gguf, steps=self.scenario.steps, depth=tokens, **self._settings))


def write_weights(
    scenario: Scenario, place: Path, threads: int, with_llama: bool
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write what the contenders load, the same values for all -> (folder per contender, GGUF per kind of linears).

    In a process of its own, whose memory is nobody's figure.
    """
    folders = {"dsv4": place / "official", "transformers": place / "transformers"}
    wanted = LINEARS if with_llama and "llama.cpp" in scenario.peers else ()
    ggufs = {linears: place / f"{linears}.gguf" for linears in wanted}
    with WorkerProcess("dsv4", threads) as worker:
        if scenario.weights == "nano":
            folders["dsv4"] = nano_path()
        else:
            config = scenario.config.to_dict(quantized=scenario.weights != "fp32")
            worker.ask("write", config=config, folder=str(folders["dsv4"]), seed=SEED, kind=scenario.weights)
        if "transformers" in scenario.peers:
            worker.ask("convert", source=str(folders["dsv4"]), target=str(folders["transformers"]))
        for linears, file in ggufs.items():
            worker.ask("convert", source=str(folders["dsv4"]), target=str(file), linears=linears)
    missing = [str(file) for file in ggufs.values() if not file.is_file()]
    if missing:
        raise BenchmarkError(f"the export wrote no {', '.join(missing)}")
    return folders, ggufs
