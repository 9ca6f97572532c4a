"""Results of a long evaluation in a file, one per line, so that a killed call goes on after the last whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Results by key, appended to `path` as they come; None: kept in memory only.

    origin: digests of what the results depend on, by name, the file's first line. ValueError if the file has others.
    """

    def __init__(self, path: Path | None, origin: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        origin = dict(origin or {})
        lines = _whole_lines(path)
        if not lines:
            self._append({"origin": origin})
            return
        given: Any = lines[0].get("origin")
        if not isinstance(given, dict):
            raise ValueError(f"{path} does not begin with the origin of its results; allowed: a new file")
        differ = [name for name in origin if origin[name] != given.get(name)]
        if differ:
            raise ValueError(
                f"{path} has results of another {' and another '.join(differ)}; allowed: a new file, or the same again"
            )
        self._found = {record["key"]: record["value"] for record in lines[1:]}

    def get(self, key: str) -> Any:
        """Result of an earlier call; None without one."""
        return self._found.get(key)

    def put(self, key: str, value: Any) -> Any:
        """Keep a result; returns it."""
        self._found[key] = value
        if self._path is not None:
            self._append({"key": key, "value": value})
        return value

    def _append(self, record: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def digest_files(paths: Iterable[Path]) -> str:
    """Digest of the names and bytes of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a ledger, from which the beginning of a line is cut that a killed call did not end."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    try:
        return [json.loads(line) for line in data[:whole].decode("utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is no ledger of results ({error}); allowed: a new file") from error
