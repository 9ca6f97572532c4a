"""Every command of docs/cluster.md does what it says; and what stands in the way of a cluster is told."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from dsv4.checkpoint.errors import CheckpointError
from dsv4.engine.cluster.client import ClusterEngine
from dsv4.engine.cluster.connection import Cluster, ReplicaPlan
from dsv4.engine.cluster.library import ClusterError
from dsv4.server.loading import load_llm

from ..readme_commands import blocks
from .conftest import CONFIG, HANG, until

pytestmark = pytest.mark.cluster
PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
LOCAL, TOKEN, MODE, HEAD, WORKER, JOINED = [line for _, text in blocks(PAGE) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder for Ray's token."""
    monkeypatch.setenv("HOME", str(tmp_path))


def program(command: str, *more: str) -> list[str]:
    """Arguments of a process for a command of the page."""
    name, *arguments = shlex.split(command)
    start = [sys.executable, "-m", "dsv4"] if name == "dsv4" else [str(Path(sys.executable).with_name(name))]
    return [*start, *arguments, *more]


@contextlib.contextmanager
def running(command: str, ready: str, *more: str) -> Iterator[str]:
    """Runs a command of the page in the background; yields its output until `ready` matches. It ends with SIGTERM."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        program(command, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        output: list[str] = []
        seen, ended = threading.Event(), threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                if re.search(ready, line):
                    seen.set()
            ended.set()
            seen.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert seen.wait(2 * HANG) and not ended.is_set(), "".join(output)
            yield "".join(output)
            below = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.wait(HANG)
            if command.startswith("dsv4"):
                assert process.returncode == 0, "".join(output)
                assert "SIGTERM received" not in "".join(output)
            until(lambda: not any(map(runs, below)))
        finally:
            process.kill()


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def answers(output: str) -> None:
    """A server whose start has been printed answers, with two engines."""
    found = re.search(r"OpenAI base URL: (http://\S+)/v1", output)
    assert found, output
    with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="unused", timeout=HANG, max_retries=0) as client:
        answer = client.chat.completions.create(model="dsv4-nano", messages=[{"role": "user", "content": "hello"}])
        assert answer.choices[0].message.content
    assert 'dsv4:replicas_up{model_name="dsv4-nano"} 2.0' in httpx.get(f"{found[1]}/metrics", timeout=HANG).text


def test_the_command_for_one_machine() -> None:
    with running(LOCAL, "Ctrl-C stops", "--port", "0", "--threads", "1") as output:
        answers(output)


def test_the_commands_for_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of Ray's commands on this machine, which is then two of the cluster's."""
    assert subprocess.run(program(TOKEN), capture_output=True, timeout=HANG, check=True).returncode == 0
    assert (tmp_path / ".ray" / "auth_token").is_file()
    name, _, value = MODE.removeprefix("export ").partition("=")
    monkeypatch.setenv(name, value)
    port = free_port()
    head, worker, joined = (
        command.replace("FIRST_MACHINE:6379", f"127.0.0.1:{port}").replace("--port 6379", f"--port {port}")
        for command in (HEAD, WORKER, JOINED)
    )
    small = ("--object-store-memory", str(100 << 20))
    with (
        running(head, "Ray runtime started", *small),
        running(worker, "Ray runtime started", *small, "--dashboard-agent-listen-port", free_port()),
        running(joined, "Ctrl-C stops", "--port", "0") as output,
    ):
        answers(output)


def test_a_wrong_address_is_an_error_at_once() -> None:
    wrong = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "dsv4", "serve", "--port", "0", "--cluster", wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 2
    assert f"dsv4 serve: error: no Ray cluster answers at {wrong}: " in done.stderr and "Traceback" not in done.stderr


def test_errors_of_loading_are_those_of_a_local_engine(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    plan = ReplicaPlan("broken", partial(load_llm, tmp_path / "broken", 1, CONFIG), CONFIG, 1, 1)
    with pytest.raises(Exception) as wanted:
        load_llm(tmp_path / "broken", 1, CONFIG)
    with pytest.raises(type(wanted.value)) as found:
        ClusterEngine(cluster, plan)
    assert str(found.value) == str(wanted.value) and not isinstance(found.value, ClusterError)
    assert isinstance(found.value, (CheckpointError, ValueError, OSError))
    assert cluster._serve is not None
    until(lambda: "dsv4-broken" not in cluster._serve.status().applications)  # so that it holds no CPU
