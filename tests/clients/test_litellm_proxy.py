"""SDKs through LiteLLM's proxy, configured and started by the text of docs/clients.md."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Served

from . import test_python
from .javascript import NO_NETWORK
from .pages import section_blocks
from .programs import ENVIRONMENTS, SILENCE, Interpreter, PythonClient

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

PROXY = "LiteLLM proxy"
PORT = 4000
CLIENTS = [PythonClient(PROXY, f"{name}.py", "openai") for name in ("openai_chat", "openai_responses")]
CHECKS = {
    "chat": test_python.test_text_thinking_and_usage,
    "stream": test_python.test_text_thinking_and_usage,
    "tools": test_python.test_a_tool_loop_and_another_turn,
    "streamed_tools": test_python.test_a_tool_loop,
    "forced": test_python.test_forced_tools_while_thinking,
    "structured": test_python.test_structured_output,
}


@pytest.fixture(scope="module")
def port(shared_server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The proxy's, once it answers."""
    folder = ENVIRONMENTS / "litellm_proxy" / "bin"
    if not (folder / "litellm").exists():
        pytest.skip("LiteLLM's proxy is not installed: make test-clients")
    home = tmp_path_factory.mktemp("proxy")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = ""
    for block in section_blocks(PROXY, shared_server.url):
        if block.language == "yaml":
            (home / Path(block.file).name).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            script = block.text.replace(str(PORT), str(port))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(home), **NO_NETWORK, **SILENCE}
    with (home / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-ec", f"exec {script}"], cwd=home, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 300
        while not _is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, (home / "output.txt").read_text()[-3000:]
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    running = Interpreter("", Path(sys.executable))
    yield running
    running.close()


@pytest.mark.parametrize("scenario", CHECKS)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.program)
def test_as_without_the_proxy(
    client: PythonClient, scenario: str, port: int, interpreter: Interpreter, server: Served
) -> None:
    def run(client: PythonClient, scenario: str) -> Any:
        return interpreter.run(client, scenario, server.url, {f"localhost:{PORT}": f"127.0.0.1:{port}"})

    CHECKS[scenario](client, scenario, run, server)
