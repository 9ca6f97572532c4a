"""Every client of docs/clients.md is one that a test runs."""

import json
import re
import shutil
import subprocess

import pytest

from tests.server.conftest import Served

from . import test_python
from .pages import PAGE, section_blocks
from .test_agents import AGENTS
from .test_javascript import CLIENTS
from .test_terminal import AIDER, LLM


def headings(section: str) -> set[str]:
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^### (.*)$", text, flags=re.M))


def test_every_configuration_is_run() -> None:
    terminal = {LLM.name, AIDER.name}
    assert headings("Python") == {client.heading for client in test_python.CLIENTS} | terminal
    assert headings("JavaScript") == {client.heading for client in CLIENTS}
    assert headings("Coding agents") == {agent.name for agent in AGENTS}


def test_the_agents_versions_are_those_that_run() -> None:
    folder = PAGE.parents[1] / "tests" / "clients"
    ran = json.loads((folder / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| ([\d.]+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert {name for name, _, _ in rows} == {agent.name for agent in AGENTS} - {"DeepSeek Harness"}
    assert all(ran[package] == version for _, package, version in rows)
    harness = (folder / "python" / "harness.txt").read_text(encoding="utf-8").strip()
    assert f"`pip install {harness}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_command_gets_an_answer(server: Served) -> None:
    (block,) = section_blocks("curl", server.url)
    done = subprocess.run(["sh", "-ec", block.text], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
