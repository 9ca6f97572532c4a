"""Files that are read, and how they are written."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from dsv4.cli import main
from dsv4.migration.files import MAX_BYTES, Skipped, read_sources
from dsv4.migration.plan import plan_file
from dsv4.migration.rules import Wishes

OLD = 'M = "deepseek-reasoner"\n'
NEW = 'M = "deepseek-flash"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An app with every kind of file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    app = tmp_path / "app"
    for name in ("a.py", "sub/b.ts", "sub/.env", "node_modules/x.js", ".hidden/y.py", "notes.txt", "out/gen.py"):
        path = app / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OLD)
    return app


def names(folder: Path) -> list[str]:
    return [found.path.relative_to(folder).as_posix() for found in read_sources([folder])]


def git(folder: Path, *arguments: str) -> None:
    try:
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no git")


def test_a_plain_folder_is_read_without_generated_ones(folder: Path) -> None:
    assert names(folder) == ["a.py", "out/gen.py", "sub/.env", "sub/b.ts"]


def test_what_git_ignores_is_not_read(folder: Path) -> None:
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("out/\nnode_modules\n*.env\n.env\n!keep.py\n")
    assert names(folder) == [".hidden/y.py", "a.py", "sub/b.ts"]
    assert names(folder / "sub") == ["b.ts"]


def test_binary_huge_and_unknown_files_are_skipped_with_a_word(folder: Path) -> None:
    (folder / "a.json").write_bytes(b"\0\1")
    (folder / "b.json").write_bytes(b"\xff\xfe")
    (folder / "c.json").write_bytes(b" " * (MAX_BYTES + 1))
    found = [found for found in read_sources([folder, folder / "notes.txt"]) if isinstance(found, Skipped)]
    assert [skipped.path.name for skipped in found] == ["a.json", "b.json", "c.json", "notes.txt"]
    assert "binary" in found[0].reason and "2 MiB" in found[2].reason and ".py" in found[3].reason


def test_exit_status_diff_and_writing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.py").chmod(0o755)
    assert main(["migrate", "app"]) == 1
    out = capsys.readouterr().out
    assert "app/a.py:1: retired-id: deepseek-reasoner was retired on 2026-07-24" in out
    assert "--- a/app/a.py\n+++ b/app/a.py\n" in out and (folder / "a.py").read_text() == OLD
    assert main(["migrate", "app", "--write"]) == 0
    assert "4 changes made" in capsys.readouterr().out
    assert (folder / "a.py").read_text() == (folder / "sub/b.ts").read_text() == NEW
    assert stat.S_IMODE((folder / "a.py").stat().st_mode) == 0o755
    assert (folder / "node_modules/x.js").read_text() == OLD
    assert main(["migrate", "app"]) == 0
    assert capsys.readouterr().out == "nothing to change.\n"


@pytest.mark.parametrize(
    "text", [OLD * 30 + 'N = "deepseek-chat"', "x\r\n" + OLD.replace("\n", "\r\n"), "\ufeff" + OLD]
)
def test_the_diff_is_what_git_applies(folder: Path, text: str) -> None:
    path = folder / "a.py"
    path.write_bytes(text.encode())
    (found,) = read_sources([path])
    assert not isinstance(found, Skipped)
    plan = plan_file(found, Wishes())
    (folder / "change.diff").write_bytes(plan.diff("a.py").encode())
    git(folder, "init", "-q")
    git(folder, "apply", "change.diff")
    assert path.read_bytes().decode() == plan.new_text != text


def test_a_file_that_changed_meanwhile_is_not_written(folder: Path) -> None:
    (found,) = read_sources([folder / "a.py"])
    assert not isinstance(found, Skipped)
    plan = plan_file(found, Wishes())
    (folder / "a.py").write_text("something else")
    with pytest.raises(ValueError, match="has changed since it was read"):
        plan.write()
    assert (folder / "a.py").read_text() == "something else"


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["no.py"], "no.py does not exist; allowed: files and folders"),
        ([], "give files or folders to look through, or --usage FILE"),
        (["app", "--base-url", "http://x/v1"], "--base-url is 'http://x/v1'; allowed: an address like"),
        (["--write", "--usage", "x.csv"], "--write needs files or folders"),
    ):
        assert main(["migrate", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dsv4 migrate: error: ") and message in error and error.count("\n") == 1
