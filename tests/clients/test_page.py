"""Every client of docs/clients.md is one that a test runs."""

import re

from . import test_python
from .pages import PAGE
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
