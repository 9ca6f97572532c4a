"""llama.cpp's own benchmark: one figure per process, read from its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.process import BenchmarkError, peak_bytes, plain_environment
from benchmarks.harness.results import Sample
from dsv4.checkpoint.gguf_export import Linears

LINEARS: tuple[Linears, ...] = ("bf16", "q8_0")  # formats for FP8 linears in a GGUF, which has no FP8
# First and longest pause between readings of the peak memory, which is gone when the process ends; short at first, for
# short runs.
POLL_S = (0.002, 0.05)
PROBE = 8  # prompt tokens of a trial run of a file
LONG_RUN = 8192  # tokens from which on runs skip the warm-up, which llama-bench makes as long as the run


class LlamaContender:
    """llama-bench with one GGUF and one setting of flash attention."""

    stays = False

    def __init__(self, program: Path, gguf: Path, threads: int, steps: int, flash: bool, repack: bool = True) -> None:
        self.name = f"llama.cpp {gguf.stem}" + ("" if repack else " repack 0") + (" fa" if flash else "")
        self.build: dict[str, Any] = {}
        self._steps = steps
        self._command = [str(program), "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json"]
        self._command += [*(["-fa", "on"] if flash else []), *([] if repack else ["--repack", "0"])]

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        prefill = measure == "prefill"
        asked = {"n_prompt": tokens, "n_gen": 0} if prefill else {"n_prompt": 0, "n_gen": self._steps}
        sizes = ["-p", str(asked["n_prompt"]), "-n", str(asked["n_gen"])]
        sizes += ["-d", str(tokens)] if tokens and not prefill else []
        sizes += ["--no-warmup"] if prefill and tokens >= LONG_RUN else []
        start = time.perf_counter()
        answer, peak = _run([*self._command, *sizes])
        wall = time.perf_counter() - start
        record = parse(answer, {**asked, "n_depth": 0 if prefill else tokens})
        self.build = {key: record.get(key) for key in ("build_commit", "build_number", "backends", "cpu_info")}
        return Sample(float(record["avg_ts"]), wall, peak)

    def runs(self) -> bool:
        try:
            self.take("prefill", PROBE, 0)
        except BenchmarkError:
            return False
        return True


def contenders(program: Path, ggufs: list[Path], threads: int, steps: int) -> list[LlamaContender]:
    """Contenders per GGUF, without and with flash attention.

    A GGUF runs with --repack 0 if llama-bench fails only with repacked weights: seen with Q8_0 and AMX, where it aborts
    on a product that its AMX code does not support.
    """
    found: list[LlamaContender] = []
    for gguf in ggufs:
        packed, plain = (LlamaContender(program, gguf, threads, steps, False, repack) for repack in (True, False))
        repack = packed.runs() or not plain.runs()
        found += [LlamaContender(program, gguf, threads, steps, flash, repack) for flash in (False, True)]
    return found


def check_program(path: Path) -> Path:
    """Absolute path of a llama-bench; BenchmarkError if `path` is not one."""
    hint = "`make llama-bench` builds it and prints its path"
    if not os.access(path, os.X_OK) or not path.is_file():
        found = "no executable file" if path.exists() else "no such file"
        raise BenchmarkError(f"--llama-bench {path}: {found}; {hint}")
    usage = subprocess.run([path.absolute(), "--help"], capture_output=True, text=True, timeout=60, check=False)
    if "--n-depth" not in usage.stdout + usage.stderr:
        raise BenchmarkError(f"--llama-bench {path}: not llama.cpp's llama-bench, or too old a one; {hint}")
    return path.absolute()


def parse(answer: str, asked: dict[str, int]) -> dict[str, Any]:
    """The single record of llama-bench's JSON; BenchmarkError unless it measured `asked`."""
    try:
        (record,) = json.loads(answer)
        if any(record[key] != value for key, value in asked.items()) or not float(record["avg_ts"]) > 0:
            raise ValueError("another figure")
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"llama-bench answered what is not one figure of {asked}: {answer[:200]!r}") from error
    return record


def _run(command: list[str]) -> tuple[str, int | None]:
    """Output of a command and its peak memory in bytes. BenchmarkError with the end of its stderr if it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=plain_environment())
        peak, pause = 0, POLL_S[0]
        try:
            while process.poll() is None:
                peak = max(peak, peak_bytes(process.pid))
                time.sleep(pause)
                pause = min(1.1 * pause, POLL_S[1])
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            tail = "\n".join(errors.read().splitlines()[-5:])
            raise BenchmarkError(f"llama-bench ended with status {process.returncode}: {' '.join(command)}\n{tail}")
        return out.read(), peak or None
