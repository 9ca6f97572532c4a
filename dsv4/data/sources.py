"""Prose from the docstrings of the installed Python's standard library.

The text is trained on, never shipped. It depends on the Python version; for one installation the documents and their
order are always the same.
"""

import ast
import inspect
import sysconfig
from functools import lru_cache
from pathlib import Path
from random import Random

# Folders without library prose: tests, vendored packages, generated tables, games.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "ensurepip",
}
LEAST_CHARACTERS, MOST_CHARACTERS = 160, 640


def _files(root: Path) -> list[Path]:
    found = [path for depth in ("*.py", "*/*.py") for path in root.glob(depth)]
    return sorted(path for path in found if not SKIPPED & set(path.relative_to(root).parts[:-1]))


def _chunks(text: str) -> list[str]:
    """Cut a docstring at blank lines into pieces of LEAST_CHARACTERS to MOST_CHARACTERS; shorter ones are dropped."""
    chunks, current = [], ""
    for paragraph in text.split("\n\n"):
        joined = f"{current}\n\n{paragraph}" if current else paragraph
        if len(joined) <= MOST_CHARACTERS:
            current = joined
            continue
        chunks.append(current)
        current = paragraph[:MOST_CHARACTERS]
    chunks.append(current)
    return [chunk for chunk in chunks if len(chunk) >= LEAST_CHARACTERS]


@lru_cache(maxsize=1)
def stdlib_documents() -> tuple[str, ...]:
    """Return the documents: files in sorted order, docstrings in source order, without duplicates."""
    documents: dict[str, None] = {}
    for path in _files(Path(sysconfig.get_paths()["stdlib"])):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                documents |= dict.fromkeys(_chunks(inspect.cleandoc(docstring)))
    return tuple(documents)


def sample_document(rng: Random) -> str:
    """Draw one document."""
    return rng.choice(stdlib_documents())
