"""Python programs on configurations of docs/clients.md: each in a process of its interpreter, with no other network."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from .javascript import NO_NETWORK, ROOT
from .pages import section_blocks

FOLDER = Path(__file__).parent / "python"
ENVIRONMENTS = ROOT / "build" / "clients"
# What clients would otherwise fetch or send when they start.
SILENCE = {
    "AGNO_TELEMETRY": "false",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OTEL_SDK_DISABLED": "true",
}


@dataclass(frozen=True)
class PythonClient:
    """`heading`: of its configuration; `program`: in tests/clients/python; `package`: distribution that it needs.

    `environment`: folder of build/clients with its packages, "" for those of the tests themselves. `reasoning`: True if
    it shows the model's thinking. `enforced`: True if it asks for structured output with a schema that the server holds
    the model to, False if with a tool that is not strict.
    """

    heading: str
    program: str
    package: str
    environment: str = ""
    reasoning: bool = True
    enforced: bool = True

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def scenarios(self) -> list[str]:
        """Public functions of the program."""
        body = ast.parse((FOLDER / self.program).read_text(encoding="utf-8")).body
        return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]

    def __str__(self) -> str:
        return self.heading


@dataclass
class Interpreter:
    """A process of an environment's interpreter, which runs functions of the clients' programs; started when needed."""

    environment: str
    python: Path

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        home = tempfile.mkdtemp(prefix="dsv4-client-")
        environment = {"PATH": os.environ["PATH"], "HOME": home, **NO_NETWORK, **SILENCE}
        return subprocess.Popen(
            [self.python, FOLDER / "answer.py"],
            cwd=home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, client: PythonClient, function: str, url: str, addresses: Mapping[str, str] | None = None) -> Any:
        """Value that a function returned. AssertionError with its traceback if it failed.

        `addresses`: of others than the server, as on the page and as in the test.
        """
        (block,) = (block for block in section_blocks(client.heading, url) if block.language == "python")
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        text = block.text
        for shown, real in (addresses or {}).items():
            text = text.replace(shown, real)
        asked = {"configuration": text, "program": str(FOLDER / client.program), "function": function}
        process.stdin.write(f"{json.dumps(asked)}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the process of {client} ended with status {process.wait(30)}"
        given = json.loads(line)
        assert "error" not in given, given["error"]
        return given["value"]

    def close(self) -> None:
        if "_process" in self.__dict__:
            self._process.terminate()
            self._process.communicate(timeout=60)


def need(client: PythonClient) -> None:
    """Skips the test unless the client is installed."""
    if client.environment:
        if not client.python.exists():
            pytest.skip(f"{client.package} is not installed: make test-clients")
        return
    try:
        importlib.metadata.version(client.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{client.package} is not installed: make test installs it")
