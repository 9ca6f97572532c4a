"""Results of a long evaluation in a file, one per line, so that a killed call goes on after the last whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Ledger:
    """Results by key, appended to `path` as they come; None: kept in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed call
                self._found[record["key"]] = record["value"]

    def get(self, key: str) -> Any:
        """Result of an earlier call; None without one."""
        return self._found.get(key)

    def put(self, key: str, value: Any) -> Any:
        """Keep a result; returns it."""
        self._found[key] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
        return value
