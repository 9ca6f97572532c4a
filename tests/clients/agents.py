"""Coding agents, headless: configured and started by the text of docs/clients.md in a home of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socketserver
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from .javascript import INSTALLED, NO_NETWORK, ROOT
from .pages import section_blocks

SECONDS = 150
PROGRAMS = (
    INSTALLED / "node_modules" / ".bin",
    *(ROOT / "build" / "clients" / name / "bin" for name in ("harness", "frameworks", "aider")),
)
COMMAND = "echo dsv4-$((6*7))"  # only a shell makes dsv4-42 of it


@dataclass(frozen=True)
class Agent:
    """`name`: its heading; `tool` and `arguments`: the call that runs COMMAND in a shell; `too_long`: words with which
    it says that a prompt does not fit, "" if it shortens the conversation and says nothing where that fails; `tries`:
    requests that it makes, at most, before it says that they are refused; `asks`: hosts that it asks, whatever its
    settings.
    """

    name: str
    program: str
    tool: str
    arguments: dict[str, str]
    too_long: str = "context length"
    tries: int = 4
    asks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A started agent; its output goes to a file, so that it never waits for a reader."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, seconds: float = SECONDS) -> str:
        """Everything that it printed."""
        self.process.wait(seconds)
        return self.log.read_text(encoding="utf-8", errors="replace")

    def cancel(self) -> None:
        """Sends the signal of Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> None:
        """Ends an agent that has not heeded Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGTERM)


class Outside(socketserver.ThreadingTCPServer):
    """Proxy for everything but loopback: it refuses, and notes what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Refusal)

    @property
    def hosts(self) -> set[str]:
        """Of the lines that were asked: CONNECT host:port, or GET http://host/path."""
        return {line.split()[1].removeprefix("http://").partition("/")[0].partition(":")[0] for line in self.asked}

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {name: url for name in NO_NETWORK if name.lower() != "no_proxy"}

    def __enter__(self) -> Outside:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Refusal(socketserver.StreamRequestHandler):
    server: Outside

    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline(1000).decode(errors="replace").strip())
        self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def start(agent: Agent, url: str, home: Path, outside: Outside | None = None) -> Run:
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
    terminal = {"TERM": "dumb", "LANG": "C.UTF-8"}
    environment = {
        "PATH": path,
        "HOME": str(home),
        **terminal,
        **NO_NETWORK,
        **(outside.environment if outside else {}),
    }
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
    """Kills the agent and every process with its home: some leave a service behind, in a session of its own."""
    home = str(run.log.parent)
    for _ in range(2):
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("HOME") == home:
                    process.kill()
        time.sleep(0.1)
    run.process.wait(10)
