"""llama.cpp's own benchmark: one figure a process, read from its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.process import BenchmarkError

# How often its peak memory is read, which ends with the process: often at first, for the sake of short runs.
POLL_S = (0.002, 0.05)
PROBE = 8  # tokens that show whether it runs a file at all
LONG_RUN = 8192  # tokens; a run as long needs no warm-up, which llama-bench would make as long again


class LlamaBench:
    """A llama-bench executable. BenchmarkError where `path` is something else."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path.absolute(), threads
        self.build: dict[str, Any] = {}
        if not path.is_file() or not os.access(path, os.X_OK):
            found = "no such file" if not path.exists() else "no executable file"
            raise BenchmarkError(f"--llama-bench {path}: {found}; `make llama-bench` builds it and prints its path")
        try:
            done = subprocess.run(
                [self.path, "--help"], capture_output=True, text=True, errors="replace", timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchmarkError(f"--llama-bench {path}: does not run: {error}") from error
        usage = done.stdout + done.stderr
        missing = [option for option in ("--n-prompt", "--n-depth", "--flash-attn") if option not in usage]
        if missing:
            raise BenchmarkError(
                f"--llama-bench {path}: not llama.cpp's llama-bench, or too old a one: its --help has no "
                f"{', '.join(missing)}; `make llama-bench` builds it and prints its path"
            )

    def needs_plain_weights(self, gguf: Path) -> bool:
        """Whether it fails at this file with its weights repacked for the processor, and runs with them as they are.

        Seen with Q8_0 where the processor has AMX: it aborts on a product that its AMX code does not take.
        """
        try:
            self.run(gguf, prompt=PROBE)
        except BenchmarkError:
            try:
                self.run(gguf, prompt=PROBE, repack=False)
            except BenchmarkError:
                return False
            return True
        return False

    def run(
        self, gguf: Path, prompt: int = 0, steps: int = 0, depth: int = 0, flash: bool = False, repack: bool = True
    ) -> tuple[float, float, int | None]:
        """(tokens per second, wall seconds, peak bytes) of a prompt, or of steps after a depth.

        BenchmarkError with its last words on failure.
        """
        command = [str(self.path), "-m", str(gguf), "-p", str(prompt), "-n", str(steps), "-t", str(self.threads)]
        command += ["-r", "1", "-o", "json", *(["-d", str(depth)] if depth else []), *(["-fa", "on"] if flash else [])]
        command += [] if repack else ["--repack", "0"]
        command += ["--no-warmup"] if prompt >= LONG_RUN else []
        start = time.perf_counter()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=out, stderr=errors)
            peak, pause = 0, POLL_S[0]
            try:
                while process.poll() is None:
                    peak = max(peak, _peak_bytes(process.pid))
                    time.sleep(pause)
                    pause = min(1.1 * pause, POLL_S[1])
            finally:
                process.kill()
                process.wait()
            wall = time.perf_counter() - start
            out.seek(0)
            errors.seek(0)
            answer, words = (file.read().decode(errors="replace") for file in (out, errors))
        if process.returncode:
            tail = "\n".join(words.splitlines()[-5:])
            raise BenchmarkError(f"llama-bench ended with status {process.returncode}: {' '.join(command)}\n{tail}")
        record = parse(answer, prompt, steps, depth)
        self.build = {key: record.get(key) for key in ("build_commit", "build_number", "backends", "cpu_info")}
        return float(record["avg_ts"]), wall, peak or None


def parse(answer: str, prompt: int, steps: int, depth: int) -> dict[str, Any]:
    """The one record of llama-bench's JSON that measured what was asked for."""
    try:
        records: list[dict[str, Any]] = json.loads(answer)
        wanted = {"n_prompt": prompt, "n_gen": steps, "n_depth": depth}
        found = [record for record in records if all(record[key] == value for key, value in wanted.items())]
        (record,) = found
        if not float(record["avg_ts"]) > 0:
            raise ValueError(f"avg_ts {record['avg_ts']}")
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"llama-bench answered what is not one figure of {prompt} + {steps} tokens at depth {depth}: "
            f"{error}; {answer[:200]!r}"
        ) from error
    return record


def _peak_bytes(pid: int) -> int:
    """Peak resident memory of a running process, 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else 0
