"""Table of docs/clients.md: which client runs which cases, and the versions that do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .javascript import ROOT
from .programs import FOLDER, PythonClient

COLUMNS = {
    "chat": ("chat", "text"),
    "stream": ("stream",),
    "turns": ("turns",),
    "tool loop": ("tools", "runner", "plugin", "final_answer"),
    "streamed tools": ("streamed_tools",),
    "forced tools": ("forced", "structured_tools"),
    "structured": ("structured",),
    "JSON": ("json_mode",),
}


def version(client: PythonClient) -> str:
    """Of its environment's requirements."""
    file = FOLDER / f"{client.environment}.txt" if client.environment else ROOT / "constraints.txt"
    found = re.search(rf"^{client.package}(?:\[.*\])?==(.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found, f"{file.name} does not pin {client.package}"
    return found[1]


def _cells(client: PythonClient) -> list[str]:
    cells = ["x" if set(names) & set(client.scenarios) else "" for names in COLUMNS.values()]
    if not client.enforced:
        cells[list(COLUMNS).index("structured")] = "by a tool"
    return [*cells, "x" if client.reasoning and {"chat", "stream"} & set(client.scenarios) else ""]


def table(clients: Sequence[PythonClient]) -> str:
    head = ["client", "version", *COLUMNS, "shows thinking"]
    rows = []
    for client in clients:
        name = client.heading + (" (Responses)" if client.program == "openai_responses.py" else "")
        rows.append([name, f"{client.package} {version(client)}", *_cells(client)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
