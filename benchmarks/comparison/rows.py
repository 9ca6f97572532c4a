"""Rows of results: one JSON object a line in results/<hardware>.jsonl, each readable without the others."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.comparison.process import ROOT


@dataclass(frozen=True)
class Row:
    """One measure of one contender: the samples of its rounds, in `unit`: bytes (fewer are better) or a rate."""

    peer: str
    measure: str
    tokens: int
    unit: str
    samples: list[float]
    floor: float  # the best that the machine allows, in the same unit
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median of the rounds."""
        return (max(self.samples) - min(self.samples)) / self.median

    @property
    def over_floor(self) -> float:
        """How many times slower or larger than the floor."""
        return self.median / self.floor if self.unit == "bytes" else self.floor / self.median


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), flags=re.M)
        name = found[1] if found else name
    return {"cpu": name, "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}


def hardware_slug(found: dict[str, Any]) -> str:
    """File name of a machine's results: "Intel(R) Xeon(R) Processor", 2 cores -> intel-xeon-processor-2-cores."""
    plain = re.sub(r"\((?:R|TM)\)|@.*", " ", str(found["cpu"]), flags=re.I)
    return "-".join(re.findall(r"[a-z0-9]+", f"{plain} {found['cores']} cores".lower()))


def commit() -> str:
    """Commit of the checkout, "+changes" behind it when the package differs from it; "unknown" outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return head + ("+changes" if git("status", "--porcelain", "--", "dsv4") else "") if head else "unknown"


def package_digest(package: Path = ROOT / "dsv4") -> str:
    """Hash of the package's Python sources: new processes of a run must load the same ones."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def append_rows(file: Path, rows: Iterable[Row], common: dict[str, Any]) -> None:
    """Append rows, each with what all of a run share (commit, shape, versions, hardware, time)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with file.open("a", encoding="utf-8") as out:
        for row in rows:
            figures = {
                "median": row.median,
                "spread": row.spread,
                "rounds": len(row.samples),
                "over_floor": row.over_floor,
            }
            out.write(json.dumps({"time": when, **asdict(row), **figures, **common}) + "\n")
