"""Runs scripts of a checkout: recipes/ and benchmarks/ are not part of the installed package."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from dsv4.commands.options import nearest


def script_names(folder: str) -> list[str]:
    """Names of a checkout's scripts in folder/; none outside of a checkout."""
    root = Path(__file__).resolve().parents[2] / folder
    return sorted(path.stem for path in root.glob("*.py") if not path.stem.startswith("_"))


def run_script(folder: str, name: str | None, arguments: list[str]) -> None:
    """Run folder/name.py of the checkout as __main__ with `arguments` as its command line."""
    root = Path(__file__).resolve().parents[2] / folder
    if not root.is_dir():
        raise ValueError(f"no {folder}/ at {root}; it comes with the repository, not with the installed package")
    scripts = script_names(folder)
    if name is None:
        raise ValueError(f"give the name of one of {folder}/: {', '.join(scripts)}")
    if name not in scripts:
        raise ValueError(f"{name!r} is not in {folder}/; allowed: {', '.join(scripts)}{nearest(name, scripts)}")
    sys.argv = [f"dsv4 {name}", *arguments]
    sys.path.insert(0, str(root.parent))
    runpy.run_path(str(root / f"{name}.py"), run_name="__main__")
