"""Results: JSON lines in results/<hardware>.jsonl, one per run with the fields its rows share, then one per row."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness.process import ROOT

DIGITS = 5  # significant digits of a saved figure
_FOLDER = re.compile(r"(?<![\w.])/(?:[^\s/'\"]+/)+")  # of an absolute path


class Sample(NamedTuple):
    """One measurement of one contender."""

    rate: float  # tokens per second
    wall_s: float  # duration of the measurement
    peak_bytes: int | None = None  # peak memory of the process


@dataclass(frozen=True)
class Row:
    """One measure of one contender: the samples of its rounds, in tokens per second or (peak memory) bytes."""

    peer: str
    measure: str
    tokens: int
    samples: list[float]
    floor: float  # best possible value on the machine, in the same unit

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def half_range(self) -> float:
        """Half the range of the samples, relative to the median."""
        return (max(self.samples) - min(self.samples)) / self.median / 2

    @property
    def spread(self) -> str:
        """Behind a figure: half the range in percent of the median; "" of a single sample."""
        return f" ±{100 * self.half_range:.0f} %" if len(self.samples) > 1 else ""


@dataclass
class Run:
    """One measurement of a scenario: its rows and the fields that they share."""

    scenario: str
    rows: list[Row]
    ceilings: dict[str, float]
    settings: dict[str, Any]
    deviation: float | None = None  # of the logits from transformers'; None without transformers
    failures: list[str] = field(default_factory=list[str])
    quick: bool = False
    gated: bool = True
    threads: int = 2
    commit: str = ""
    hardware: dict[str, Any] = field(default_factory=dict[str, Any])
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def warning(self) -> str:
        """Behind a description: that the frozen tests were skipped; "" if they passed."""
        return "" if self.gated else "; UNGATED: tests not run"

    def find(self, peer: str, measure: str, tokens: int) -> Row | None:
        """The best row of a contender: llama.cpp has several, one per GGUF and setting of flash attention."""
        found = [row for row in self.rows if row.peer == peer or (row.peer.startswith(f"{peer} ") and peer != "dsv4")]
        found = [row for row in found if (row.measure, row.tokens) == (measure, tokens)]
        better = min if measure == "peak memory" else max
        return better(found, key=lambda row: row.median, default=None)

    def ratio(self, peer: str, measure: str, tokens: int) -> float | None:
        """dsv4's median divided by the best of another contender; None if one of the two has no row."""
        ours, theirs = self.find("dsv4", measure, tokens), self.find(peer, measure, tokens)
        return ours.median / theirs.median if ours and theirs else None


def append(file: Path, run: Run) -> None:
    """Append a run and its rows. Of the machine's paths in a failure the last part is kept."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        kept = {key: value for key, value in asdict(run).items() if key != "rows"}
        kept["failures"] = [_FOLDER.sub("", text) for text in run.failures]
        out.write(json.dumps(kept) + "\n")
        for row in run.rows:
            kept = {**asdict(row), "samples": [_rounded(x) for x in row.samples], "floor": _rounded(row.floor)}
            out.write(json.dumps(kept) + "\n")


def read(file: Path) -> list[Run]:
    """Read the runs of a file, oldest first. ValueError names the line of a row without a run."""
    runs: list[Run] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        record: dict[str, Any] = json.loads(text)
        if "scenario" in record:
            runs.append(Run(**record, rows=[]))
        elif not runs:
            raise ValueError(f"{file}:{number}: a row before the first run")
        else:
            runs[-1].rows.append(Row(**record))
    return runs


def newest(runs: Iterable[Run]) -> dict[str, Run]:
    """The last full run of each scenario: neither quick nor with its tests skipped."""
    return {run.scenario: run for run in runs if run.gated and not run.quick}


def commit() -> str:
    """Commit of the checkout, with "+changes" appended if the package differs from it; "unknown" outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=9", "HEAD")
    return head + ("+changes" if git("status", "--porcelain", "--", "dsv4", "native") else "") if head else "unknown"


def package_digest(package: Path = ROOT / "dsv4") -> str:
    """Hash of the package's Python sources, which must be the same for all processes of a run."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
