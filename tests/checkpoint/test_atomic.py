"""Files and folders are whole or absent; writers remove the leftovers of killed ones; a full disk is reported."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.checkpoint import CheckpointError, convert, save_model
from dsv4.checkpoint.atomic import DiskFullError, check_space, clear_leftovers, new_file, new_folder
from dsv4.checkpoint.files import ShardWriter
from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.cli import main
from dsv4.training.export import check_output
from dsv4.training.state import RunPosition, save_state

SECONDS = 120  # timeout of a process on a busy machine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(code: str, *arguments: Path) -> None:
    """Run code until it prints a line, then kill it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(SECONDS)


CONVERT = """
import sys, time
from dsv4.checkpoint import convert
from dsv4.checkpoint.gguf_export import export_gguf
def progress(done, total):
    if done > total / 2:
        print("writing", flush=True)
        time.sleep(1000)
if sys.argv[2].endswith(".gguf"):
    export_gguf(sys.argv[1], sys.argv[2], progress=progress)
else:
    convert(sys.argv[1], sys.argv[2], "bf16", progress=progress, overwrite=True)
"""


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_the_next_conversion_clears_a_killed_ones_leftovers(target: str, official: Any, tmp_path: Path) -> None:
    source = official.write(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    killed(CONVERT, source, tmp_path / target)
    left = [name for name in names(tmp_path) if name.startswith(f".{target}.")]
    assert len(left) == 1 and target not in names(tmp_path)
    (tmp_path / ".out2.0123abcd.tmp").mkdir()  # leftover of another target
    if target == "out":
        convert(source, tmp_path / target, "bf16")
    else:
        export_gguf(source, tmp_path / target)
    assert names(tmp_path) == [".out2.0123abcd.tmp", target, "source"]


TRAIN = """
import sys, time
from pathlib import Path
from dsv4.checkpoint.atomic import new_file
with new_file(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(1000)
"""


def state(path: Path) -> None:
    """A training state of a few bytes, as training saves it."""

    class Empty:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"weight": torch.zeros(50_000)}

    save_state(path, Empty(), Empty(), RunPosition())  # type: ignore[arg-type]


def test_the_next_training_save_clears_a_killed_ones_leftovers(tmp_path: Path) -> None:
    for _ in range(2):
        killed(TRAIN, tmp_path / "state.pt")
    (tmp_path / ".state.pt.4711.tmp").write_text("as earlier versions named theirs")
    assert [name.startswith(".state.pt.") for name in names(tmp_path)] == [True, True]
    state(tmp_path / "state.pt")
    assert names(tmp_path) == ["state.pt"]


def test_a_living_writers_temporary_files_are_kept(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model", overwrite=False) as first:
        (first / "config.json").write_text("{}")
        with new_file(tmp_path / "model.txt") as file:
            clear_leftovers(tmp_path / "model.txt")
            assert file.exists()
        with new_folder(tmp_path / "model", overwrite=False) as second:
            (second / "config.json").write_text("[]")
            assert first.exists()
        (tmp_path / "model" / "config.json").unlink()  # an empty folder may be replaced
    assert names(tmp_path) == ["model", "model.txt"] and (tmp_path / "model" / "config.json").read_text() == "{}"


def test_a_folder_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    """Killed between two renames: the old folder is the only whole one."""
    old, new = tmp_path / ".model.0123abcd.old", tmp_path / ".model.0123abcd.tmp"
    for folder in (old, new):
        folder.mkdir()
        (folder / "config.json").write_text(folder.suffix)
    clear_leftovers(tmp_path / "model")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config.json").read_text() == ".old"
    (tmp_path / ".model.89abcdef.old").mkdir()  # killed a moment later: the new folder is in place
    clear_leftovers(tmp_path / "model")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config.json").read_text() == ".old"


def model(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a model"])
def test_a_linked_folder_is_replaced_where_it_is(before: str, tmp_path: Path) -> None:
    disk, here = tmp_path / "disk", tmp_path / "here"
    here.mkdir()
    (here / "out").symlink_to(disk / "big")
    if before != "nothing":
        disk.mkdir()
        (disk / "big").mkdir()
        (disk / ".big.0123abcd.tmp").mkdir()  # of a killed writer
    if before == "a model":
        model(disk / "big", "old")
    with new_folder(here / "out", overwrite=before == "a model") as folder:
        assert folder.parent == disk and names(here) == ["out"]
        model(folder, "new")
    assert names(disk) == ["big"] and names(here) == ["out"] and (here / "out").is_symlink()
    assert (disk / "big" / "config.json").read_text() == "new"


def test_a_link_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    model(tmp_path / "big", "old")
    (tmp_path / ".out.0123abcd.old").symlink_to(tmp_path / "big")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        model(folder, "new")
    (tmp_path / ".out.89abcdef.old").symlink_to(tmp_path / "big")  # killed a moment later
    clear_leftovers(tmp_path / "out")
    assert names(tmp_path) == ["big", "out"] and (tmp_path / "out" / "config.json").read_text() == "new"


def test_the_space_of_a_linked_disk_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    usage: Callable[[Path], Any] = lambda path: type("Usage", (), {"free": 10 * (path == tmp_path / "disk")})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    check_space(tmp_path / "out", 10)
    with pytest.raises(DiskFullError):
        check_space(tmp_path / "out", 11)


def test_a_mount_point_is_refused_before_anything_is_written(
    official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    (tmp_path / "link").symlink_to(mounted)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mounted)  # pyright: ignore
    for target in (mounted, tmp_path / "link"):
        with (
            pytest.raises(CheckpointError, match=r"give one within it, such as .*/model; found a mount"),
            new_folder(target, False),
        ):
            raise AssertionError("begun")
        with pytest.raises(CheckpointError, match="found a mount point"):  # not that the disk beside it is full
            save_model(official.values, official.config, target)
        with pytest.raises(ValueError, match="is a mount point, which a model cannot replace; give a folder within it"):
            check_output(target, tmp_path / "run")
    assert names(tmp_path) == ["disk", "link"]
    with new_folder(mounted / "model", overwrite=False) as folder:
        model(folder, "new")
    assert names(mounted) == ["model"]


def test_a_linked_file_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "file")
    for text in ("one", "two"):
        with new_file(tmp_path / "out") as file:
            file.write_text(text)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "file").read_text() == text
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["file"]


def test_devices_and_pipes_are_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    screen, terminal = os.openpty()  # not /dev/null, which a mistake here would replace
    (tmp_path / "terminal").symlink_to(os.ttyname(terminal))
    for name, end in (("pipe", reading), ("terminal", screen)):
        with new_file(tmp_path / name) as file:
            file.write_text("text")
        assert os.read(end, 10) == b"text"
    for end in (reading, screen, terminal):
        os.close(end)
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["pipe", "terminal"]


PRINT = """
import sys
import tempfile
from pathlib import Path
from dsv4.checkpoint.atomic import new_file
print("before")
with new_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("written\\n")
print("after")
"""


@pytest.mark.parametrize("to", ["a file", "a pipe"])
def test_the_output_of_the_process_is_written_into(to: str, tmp_path: Path) -> None:
    """In the order of what it prints, also if the output is a file."""
    (tmp_path / "stdout").symlink_to("/dev/stdout")  # a link, since a mistake here would replace it
    with (tmp_path / "log").open("wb") as log:
        ran = subprocess.run(
            [sys.executable, "-c", PRINT, str(tmp_path / "stdout")],
            check=True,
            timeout=SECONDS,
            stdout=log if to == "a file" else subprocess.PIPE,
        )
    printed = (tmp_path / "log").read_bytes() if to == "a file" else ran.stdout
    assert printed == b"before\nwritten\nafter\n"


def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    listener.bind("socket")
    listener.close()
    for name in ("folder", "socket"):
        with (
            pytest.raises(CheckpointError, match=f"or of a file to replace; found a {name}"),
            new_file(tmp_path / name),
        ):
            raise AssertionError("begun")
    assert names(tmp_path) == ["folder", "socket"]


def fail(error: int) -> Callable[..., None]:
    def write(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return write


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "no space left"),
        (errno.EFBIG, "larger than a file may be"),
    ],
)
def test_a_full_disk_is_reported(
    error: int,
    said: str,
    official: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = official.write(tmp_path / "source")
    monkeypatch.setattr(ShardWriter, "write", fail(error))
    command = ["convert", str(source), str(tmp_path / "out"), "--format", "bf16"]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert said in printed and str(tmp_path / "out") in printed and "Errno" not in printed
    with pytest.raises(DiskFullError) as raised:
        save_model(official.values, official.config, tmp_path / "out")
    assert raised.value.errno == error
    assert names(tmp_path) == ["source"]


def test_too_little_space_is_reported_before_anything_is_written(
    official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = official.write(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    said = r"cannot be written: no space left on the disk: it takes [0-9.]+ MB, and 0.1 MB are free in"
    with pytest.raises(DiskFullError, match=said):
        convert(source, tmp_path / "new" / "out", "bf16")
    with pytest.raises(DiskFullError, match=said):
        save_model(official.values, official.config, tmp_path / "out")
    with pytest.raises(DiskFullError, match=said):
        export_gguf(source, tmp_path / "out.gguf")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("what", ["folder", "gguf", "training"])
def test_a_limit_on_the_size_of_files_is_reported(what: str, official: Any, tmp_path: Path) -> None:
    """A real limit (`ulimit -f`), reached in the middle of a write."""
    source = official.write(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            DiskFullError,
            match=r"out.* cannot be written: .*larger than a file may be here \(file system, or ulimit -f\)",
        ):
            if what == "folder":
                convert(source, tmp_path / "out", "bf16")
            elif what == "gguf":
                export_gguf(source, tmp_path / "out.gguf")
            else:
                state(tmp_path / "out.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["source"]


def test_the_space_for_a_folder_or_a_pipe_is_where_its_bytes_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(Path(place)) or usage(place))
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "pipe")
    check_space(tmp_path / "model", 1)
    check_space(tmp_path / "pipe", 1)
    assert asked == [tmp_path.resolve(), Path(tempfile.gettempdir())]
