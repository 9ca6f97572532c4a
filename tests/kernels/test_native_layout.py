"""The folders of native/: includes point up one list, files stay readable."""

import re
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
# A file may include from its own folder and from earlier ones.
ORDER = ("base", "gemm", "model", "training", "dispatch", "python")
FILES = sorted(path for path in NATIVE.rglob("*") if path.suffix in (".h", ".cpp"))
MAX_LINES = 400


def included(path: Path) -> list[str]:
    return re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(NATIVE)))
def test_includes_point_up_the_list_of_folders(path: Path) -> None:
    level = ORDER.index(path.relative_to(NATIVE).parts[0])
    for name in included(path):
        assert (NATIVE / name).is_file(), f"{name}: included by its path below native/"
        assert ORDER.index(name.split("/")[0]) <= level, f"{path.relative_to(NATIVE)} includes {name}"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_a_weight_format_stands_alone() -> None:
    formats = list((NATIVE / "gemm" / "formats").glob("*.h"))
    assert {"fp4.h", "fp8.h", "bf16.h"} <= {path.name for path in formats}
    for path in formats:
        assert all(name.startswith(("base/", "gemm/formats/")) for name in included(path)), path.name


def test_the_readme_names_every_folder() -> None:
    text = (NATIVE / "README.md").read_text(encoding="utf-8")
    assert all(f"`{folder}/`" in text for folder in ORDER)
    for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:h|cpp))`", text):
        assert (NATIVE / name).is_file(), name
