"""The commands of docs/data.md run, one after the other."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from dsv4.cli import main
from dsv4.data.corpus.debian import DebianPackage

from ..readme_commands import arguments, blocks
from .test_corpus import make_deb

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for _, text in blocks(PAGE) for line in text.splitlines()]
    assert len(commands) == 6 and all(command.startswith("dsv4 ") for command in commands)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A page\n\nSome words.\n" * 40)
    serve_packages(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv])  # a recipe sets its own
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in commands:
        try:
            status = main(arguments(command))
        except SystemExit as end:  # of a recipe
            status = end.code
        assert status == 0, command
    assert (tmp_path / "runs/try/model/config.json").exists() and (tmp_path / "shards-corpus/index.json").exists()


def serve_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small packages in place of the mirror's."""
    archives: dict[str, Path] = {}
    for name, path in (("dict-devil", "usr/share/doc/d/a.txt"), ("debian-faq", "usr/share/doc/f/faq.en.html")):
        make_deb(tmp_path, name, {path: f"<p>A text of the package {name}, which is long enough to be kept.</p>"})
        archives[name] = tmp_path / "made" / f"{name}.deb"
    index = {name: DebianPackage(name, "1", f"pool/{name}.deb", 1, "0") for name in archives}

    def fetch(mirror: str, package: DebianPackage, folder: Path) -> Path:
        return archives[package.name]

    monkeypatch.setattr("dsv4.data.corpus.debian.fetch_index", lambda mirror, suite: index)
    monkeypatch.setattr("dsv4.data.corpus.build.fetch_package", fetch)
