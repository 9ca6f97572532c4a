"""Contenders behind one interface: tokens per second of a prompt, or of decoding at a depth."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness import peers
from benchmarks.harness.llama_cpp import LINEARS
from benchmarks.harness.process import Process
from benchmarks.harness.random_checkpoint import write_random_checkpoint, write_random_values
from benchmarks.harness.results import Sample
from benchmarks.harness.scenarios import Scenario
from dsv4.checkpoint import convert
from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.config import nano_path

SEED = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
WARM_UP = 64  # tokens of a process's first forward, which is not counted


class Contender(Protocol):
    name: str  # in the rows
    stays: bool  # True if one process gives all figures

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        """Measure once. BenchmarkError if the contender fails at that length."""
        ...


class PeerContender:
    """dsv4 or transformers in a long-lived process."""

    stays = True

    def __init__(self, name: str, process: Process, scenario: Scenario) -> None:
        self.name, self._process, self._scenario = name, process, scenario

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the peer (peers.py) in its process."""
        return self._process.call(peers.ask, self.name, method, *arguments)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load and warm up; return the settings. Reads all weights once, so that mapped files are in memory."""
        settings = self._process.call(peers.load, self.name, folder)
        self.ask("prefill", WARM_UP, SEED)
        self.ask("begin", 2)
        for turn in range(2):
            self.ask("feed", 1, turn)
        if self._scenario.weights == "codes":
            self.ask("prefill", self._scenario.prefill[-1], SEED)
        return settings

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        if measure == "prefill":
            counted, (seconds, peak) = tokens, self.ask("prefill", tokens, SEED + turn)
        else:
            counted = self._scenario.steps
            seconds, peak = self.ask("decode_at", tokens, counted, SEED + turn)
        return Sample(counted / seconds, seconds, peak)


def write_weights(
    scenario: Scenario, place: Path, threads: int, with_llama: bool, with_tokenizer: bool = False
) -> tuple[dict[str, Path], list[Path]]:
    """Write the model files, with the same values for all contenders; return (folder per package, GGUFs).

    with_tokenizer: random weights get nano's, whose vocabulary they then must have.

    Runs in a separate process, whose memory is not measured.
    """
    folders = {"dsv4": place / "official", "transformers": place / "transformers"}
    linears = LINEARS if with_llama and "llama.cpp" in scenario.peers else ()
    ggufs = [place / f"{name}.gguf" for name in linears]
    place.mkdir(parents=True, exist_ok=True)
    with Process("dsv4", threads) as process:
        if scenario.weights == "nano":
            folders["dsv4"] = nano_path()
        elif scenario.weights == "codes":
            process.call(write_random_checkpoint, scenario.config, folders["dsv4"], SEED)
        else:
            process.call(write_random_values, scenario.config, folders["dsv4"], SEED, scenario.weights)
        if with_tokenizer and scenario.weights != "nano":
            for file in TOKENIZER_FILES:
                shutil.copy(nano_path() / file, folders["dsv4"])
        if "transformers" in scenario.peers:
            process.call(convert, folders["dsv4"], folders["transformers"], "transformers", overwrite=True)
        for name, gguf in zip(linears, ggufs, strict=True):
            process.call(export_gguf, folders["dsv4"], gguf, linears=name, overwrite=True)
    return folders, ggufs
