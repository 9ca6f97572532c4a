"""Files of a code base that a migration reads: by their names, without those that git ignores."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 2 << 20
_LANGUAGES = {
    ".py": "python",
    **dict.fromkeys((".js", ".jsx", ".mjs", ".cjs"), "javascript"),
    **dict.fromkeys((".ts", ".tsx", ".mts", ".cts"), "typescript"),
    ".go": "go",
    ".java": "java",
    **dict.fromkeys((".json", ".ipynb"), "json"),
    **dict.fromkeys((".yaml", ".yml"), "yaml"),
    ".toml": "toml",
    **dict.fromkeys((".sh", ".bash", ".zsh"), "bash"),
}
# Folders that are no code of one's own, where git does not say so.
_SKIPPED = {"node_modules", "venv", "__pycache__", "dist", "build", "target", "vendor", "site-packages"}


@dataclass(frozen=True)
class SourceFile:
    path: Path
    language: str
    text: str


@dataclass(frozen=True)
class Skipped:
    path: Path
    reason: str


def language_of(path: Path) -> str | None:
    """Language by the file's name; None for a file that is not read."""
    if path.name == ".env" or path.name.startswith(".env.") or path.suffix == ".env":
        return "bash"
    return _LANGUAGES.get(path.suffix.lower())


def read_sources(places: Iterable[Path]) -> Iterator[SourceFile | Skipped]:
    """Sources among files and in folders, in order of their paths, and files skipped with the reason.

    FileNotFoundError for a place that is not there.
    """
    seen: set[Path] = set()
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist; allowed: files and folders")
        for path in [place] if place.is_file() else _files_in(place):
            if (resolved := path.resolve()) in seen:
                continue
            found = _read(path, named=place.is_file())
            if found is not None:
                seen.add(resolved)
                yield found


def _read(path: Path, named: bool) -> SourceFile | Skipped | None:
    """A file; None for one in another language, unless the user has named it."""
    language = language_of(path)
    if language is None:
        return Skipped(path, f"not read: allowed are {', '.join(sorted(_LANGUAGES))} and .env") if named else None
    if path.stat().st_size > MAX_BYTES:
        return Skipped(path, f"larger than {MAX_BYTES >> 20} MiB")
    content = path.read_bytes()
    try:
        if b"\0" in content:
            raise ValueError
        return SourceFile(path, language, content.decode())
    except ValueError:
        return Skipped(path, "binary, or not in UTF-8")


def _files_in(folder: Path) -> list[Path]:
    """Files of a folder: those that git knows or would add, or all outside of hidden and generated folders."""
    try:
        command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
        listed = subprocess.run(command, capture_output=True, check=True).stdout
        found = [folder / os.fsdecode(name) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        found = []
    return sorted(path for path in found or _walk(folder) if path.is_file() and not path.is_symlink())


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith(".")]
        yield from (Path(parent, name) for name in names)
