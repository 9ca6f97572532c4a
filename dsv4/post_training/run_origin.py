"""Origin of a run, kept in its folder for its results: its command, and the code and machine of each of its parts."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import dsv4
from dsv4.checkpoint.atomic import new_file

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Part:
    """Code and machine of a run from a start, or a resumption, to the next."""

    code: str
    machine: str


UNKNOWN = Part("code that was not recorded", "a machine that was not recorded")


@dataclass(frozen=True)
class RunOrigin:
    """Command of a run, "" where it was not recorded, and its parts: a resumption is one if anything is another."""

    command: str = ""
    parts: tuple[Part, ...] = ()

    @property
    def lines(self) -> list[str]:
        """A line of each part."""
        return [f"{part.code}, on {part.machine}" for part in self.parts]


def record_origin(run_dir: Path, device: str, command: str | None = None) -> RunOrigin:
    """Record this process in the run's folder: as its first part, with its command, or, without one, as the next."""
    here = Part(describe_code(), describe_machine(device))
    if command is not None:
        origin = RunOrigin(command, (here,))
    else:
        origin = read_origin(run_dir)
        if origin.parts[-1] != here:
            origin = RunOrigin(origin.command, (*origin.parts, here))
    with new_file(run_dir / ORIGIN) as temporary:
        temporary.write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
    return origin


def read_origin(run_dir: Path) -> RunOrigin:
    """The origin that a run's folder records; of a run that began without a record, an unknown part."""
    path = run_dir / ORIGIN
    if not path.exists():
        return RunOrigin(parts=(UNKNOWN,))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return RunOrigin(found["command"], tuple(Part(**part) for part in found["parts"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to go on without the run's command") from error


def describe_code() -> str:
    """Version of the package and, in a git checkout, its commit, "with changes" if tracked files have some."""
    root, version = Path(__file__).resolve().parents[2], f"dsv4 {dsv4.__version__}"
    if not (root / ".git").exists():  # else git would name the commit of a repository around the package
        return version
    words = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= with changes"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}, commit {found}"


def describe_machine(device: str) -> str:
    """Processor and cores of this process and, where a model trains on one, the GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{_processor()}, {cores} {'core' if cores == 1 else 'cores'}{gpu}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
