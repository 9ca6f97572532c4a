"""Control groups of sandboxes, over folders in place of a hierarchy where there is none."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from dsv4.post_training.sandbox import cgroup, supervised
from dsv4.post_training.sandbox.cgroup import ControlGroup, delegated
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from tests.post_training.sandbox.conftest import SMALL, pid_of


def fake_hierarchy(top: Path, controllers: str) -> Path:
    """Files of a version 2 hierarchy in which this process sits in /slice/own."""
    for folder in (top, top / "slice", top / "slice" / "own"):
        folder.mkdir()
        (folder / "cgroup.controllers").write_text("cpu memory pids")
        (folder / "cgroup.subtree_control").write_text(controllers if folder.name == "slice" else "")
        (folder / "cgroup.procs").write_text("")
    (top / "membership").write_text("4:memory:/x\n0::/slice/own\n")
    return top


def test_a_delegated_control_group_is_found(tmp_path: Path) -> None:
    top = fake_hierarchy(tmp_path / "cgroup", "cpu memory pids")
    assert delegated(top, top / "membership") == top / "slice"
    (top / "slice" / "cgroup.subtree_control").write_text("memory")
    assert delegated(top, top / "membership") is None
    assert delegated(tmp_path / "nothing", top / "membership") is None
    assert delegated(top, tmp_path / "nothing") is None


def test_control_groups_of_killed_owners_are_removed(tmp_path: Path) -> None:
    parent = fake_hierarchy(tmp_path / "cgroup", "cpu memory pids") / "slice"
    ended = subprocess.Popen(["true"])
    ended.wait()
    own = ControlGroup.make(SMALL, parent)
    prefix = f"dsv4-sandbox-{os.stat('/proc/self/ns/pid').st_ino}"
    assert own is not None and own.path.name.startswith(f"{prefix}-{os.getpid()}-")
    elsewhere = f"dsv4-sandbox-7-{ended.pid}-1-a"  # of another namespace of processes
    kept = [own.path, *(parent / name for name in ("dsv4-sandbox-other", elsewhere, f"{prefix}-{ended.pid}-1-full"))]
    for path in (*kept[1:], parent / f"{prefix}-{ended.pid}-1-a", parent / f"{prefix}-{os.getpid()}-1-a"):
        path.mkdir()
    (kept[3] / "process").write_text("")  # still ending, so that the kernel would not remove it
    new = ControlGroup.make(SMALL, parent)
    assert new is not None and set(parent.glob("dsv4-*")) == {*kept, new.path}
    own.remove()
    assert not own.path.exists()


def test_a_control_group_whose_limit_is_refused_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(*_: object) -> None:
        raise OSError("no such limit")

    monkeypatch.setattr(ControlGroup, "_write", refuses)
    with pytest.raises(OSError, match="no such limit"):
        ControlGroup.make(SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_control_group_gets_the_limits_and_reports_what_it_saw(tmp_path: Path) -> None:
    group = ControlGroup(tmp_path / "group", SMALL)
    for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max"):
        (group.path / name).write_text("max")
    group.path.rename(tmp_path / "made")
    # The kernel makes the files with the folder; here they stand before it.
    written: dict[str, int | str] = {}
    group._write = lambda name, value: written.update({name: value})  # type: ignore[method-assign]
    group.path = tmp_path / "made"
    group.limit(SMALL)
    assert written == {
        "memory.max": (96 + 4 + 64) * MIB,
        "memory.swap.max": 0,
        "pids.max": 32,
        "cpu.max": "100000 100000",
    }
    (group.path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (group.path / "pids.events").write_text("max 5\n")
    outcome = {"reached": ["disk_bytes"], "killed_by": None, "signal": 9}
    group.amend(outcome, {"memory.events": 1, "pids.events": 5})
    assert outcome == {"reached": ["disk_bytes", "memory_bytes"], "killed_by": "memory", "signal": 9}
    assert group.entering(["bwrap", "x"])[-3:] == [str(group.path / "cgroup.procs"), "bwrap", "x"]


@pytest.mark.skipif(delegated() is None, reason="no delegated control group (version 2) with memory and pids here")
def test_a_control_group_holds_memory_and_processes() -> None:
    with NamespaceSandbox(Limits(memory_bytes=64 * MIB, processes=16)) as box:
        assert box._group is not None and box._group.path.exists()
        code = "kept = []\nwhile True: kept.append(bytearray(b'x') * (1 << 20))"
        assert "memory_bytes" in box.exec([box.python, "-c", code]).reached
        assert "processes" in box.exec("for i in $(seq 40); do sleep 1 & done; wait").reached
        path = box._group.path
    assert not path.exists()


def test_a_command_joins_the_control_group_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a folder in place of a control group: the process that becomes bubblewrap writes its number there."""
    (tmp_path / "group").mkdir()
    made = object.__new__(ControlGroup)
    made.path = tmp_path / "group"
    for name in ("memory.events", "pids.events"):
        (made.path / name).write_text("max 0\n")
    monkeypatch.setattr(made, "remove", lambda: None)
    monkeypatch.setattr(cgroup.ControlGroup, "make", lambda limits: made)
    with NamespaceSandbox(SMALL) as box:
        assert box.exec("id -u").stdout == b"1000\n"
        assert int((made.path / "cgroup.procs").read_text()) == pid_of(box)
        if os.getuid() == 0:
            assert psutil.Process(pid_of(box)).uids().real in range(*supervised.UNUSED_USERS)
