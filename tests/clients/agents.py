"""Coding agents, headless: configured and started by the text of docs/clients.md in a home of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .javascript import INSTALLED, NO_NETWORK, ROOT
from .pages import section_blocks

SECONDS = 240
PROGRAMS = (
    INSTALLED / "node_modules" / ".bin",
    *(ROOT / "build" / "clients" / name / "bin" for name in ("python", "frameworks", "aider")),
)
COMMAND = "echo dsv4-$((6*7))"  # only a shell makes dsv4-42 of it


@dataclass(frozen=True)
class Agent:
    """`name`: its heading; `tool` and `arguments`: the call that runs COMMAND in a shell; `quits_on`: signal of a user
    who cancels; `too_long`: words with which it says that a prompt does not fit.
    """

    name: str
    program: str
    tool: str
    arguments: dict[str, str]
    too_long: str = "context length"
    quits_on: signal.Signals = signal.SIGINT
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A started agent; its output goes to a file, so that it never waits for a reader."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, seconds: float = SECONDS) -> str:
        """Everything that it printed."""
        self.process.wait(seconds)
        return self.log.read_text(encoding="utf-8", errors="replace")

    def quit(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


def start(agent: Agent, url: str, home: Path) -> Run:
    """Writes the agent's configuration into `home` and runs its command in a folder there.

    Skips the test if it is not installed.
    """
    path = os.pathsep.join([*map(str, PROGRAMS), os.environ["PATH"]])
    if shutil.which(agent.program, path=path) is None:
        pytest.skip(f"{agent.program} is not installed: make test-clients")
    script = ""
    for block in section_blocks(agent.name, url):
        if block.language == "sh":
            script += block.text
        else:
            file = home / block.file.removeprefix("~/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    work = home / "work"
    work.mkdir()
    environment = {"PATH": path, "HOME": str(home), "TERM": "dumb", "LANG": "C.UTF-8", **NO_NETWORK, **agent.environment}
    log = home / "output.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-ec", script],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Run(process, log)


def stop(run: Run) -> None:
    """Kills the agent and its children, if they still run."""
    for _ in range(2):
        try:
            os.killpg(run.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    run.process.wait(10)
