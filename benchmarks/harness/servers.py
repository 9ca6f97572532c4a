"""Servers as contenders: command line, readiness, peak memory, end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.process import ROOT, BenchmarkError, peak_bytes, plain_environment

READY_S = 300.0  # longest start
END_S = 20.0  # from SIGTERM to SIGKILL
# V4's prompt for a conversation without tools and thinking, as deepseek-recipe renders it.
TEMPLATE = (
    "{{ '<｜begin▁of▁sentence｜>' }}{% for m in messages %}{{ ('<｜User｜>' if m['role'] == 'user' else '')"
    " + m['content'] }}{% endfor %}{{ '<｜Assistant｜></think>' }}"
)


@dataclass(frozen=True)
class Server:
    """Start of a contender, and fields of its requests beside messages and max_tokens."""

    name: str
    command: Sequence[str]  # without the port
    port_flag: str = "--port"
    request: dict[str, Any] = field(default_factory=dict[str, Any])

    @contextmanager
    def running(self, threads: int) -> Iterator[Running]:
        """Start on a free port, wait until it is healthy; end it afterwards.

        BenchmarkError with the end of the log if the process ends first.
        """
        environment = plain_environment() | {
            "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": _path()
        }  # fmt: skip
        with tempfile.TemporaryFile("w+", errors="replace") as log, reserved_port() as port:
            command = [*self.command, self.port_flag, str(port)]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running = Running(process, port)
            try:
                try:
                    running.wait()
                    yield running
                except BenchmarkError as error:
                    if process.poll() is None:
                        raise
                    log.seek(0)
                    tail = "\n".join(log.read().splitlines()[-4:])
                    raise BenchmarkError(f"{self.name}: {error}\n{tail}") from error
            finally:
                process.terminate()
                try:
                    process.wait(END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


class Running:
    def __init__(self, process: subprocess.Popen[bytes] | subprocess.Popen[str], port: int) -> None:
        self.port, self._process = port, process

    def wait(self) -> None:
        """Until GET /health answers 200. BenchmarkError if the process ends or takes longer than READY_S."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchmarkError(f"ended with status {self._process.returncode} before it was ready")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise BenchmarkError(f"not ready after {READY_S:.0f} s")

    @property
    def pid(self) -> int:
        return self._process.pid

    def peak_bytes(self) -> int:
        return peak_bytes(self._process.pid)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no process is given meanwhile but one that asks for it by number, with either option of reuse."""
    with socket.socket() as holder:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            holder.setsockopt(socket.SOL_SOCKET, option, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def free_port() -> int:
    """A port on which nobody listens."""
    with reserved_port() as port:
        return port


def dsv4_server(folder: Path, threads: int, *flags: str) -> Server:
    """`dsv4 serve` of this checkout."""
    command = [sys.executable, "-m", "dsv4", "serve", str(folder), "--threads", str(threads), *flags]
    return Server(
        "dsv4", command, request={"model": "deepseek-v4-flash", **_PLAIN, "thinking": {"type": "disabled"}, **_ENDLESS}
    )


def llama_server(program: Path, gguf: Path, threads: int, slots: int, context: int, flash: bool) -> Server:
    """llama-server with a slot per concurrent request, no reuse of prompts. context: tokens of the one cache of all."""
    template = gguf.with_name("template.jinja")
    template.write_text(TEMPLATE, encoding="utf-8")
    name = f"llama.cpp {gguf.stem}" + (" fa" if flash else "")
    command = [
        str(program), "-m", str(gguf), "-t", str(threads), "-tb", str(threads), "--threads-http", str(slots + 2),
        "-np", str(slots), "-c", str(context), "-fa", "on" if flash else "off", "--cont-batching", "--kv-unified",
        "--no-cache-prompt", "--cache-ram", "0", "--jinja", "--chat-template-file", str(template),
        "--reasoning-format", "none", "--host", "127.0.0.1",
    ]  # fmt: skip
    return Server(name, command, request={**_PLAIN, **_ENDLESS, "cache_prompt": False})


def transformers_server(folder: Path, *flags: str) -> Server:
    """`transformers serve`. Its requests cannot ignore the end of a sentence: the folder names a token that none is."""
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": -1}')
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *flags]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    return Server("transformers", command, request={"model": str(folder), "temperature": 0})


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


_PLAIN: dict[str, Any] = {"temperature": 0, "stream_options": {"include_usage": True}}
_ENDLESS = {"ignore_eos": True}  # so that all answers have max_tokens
