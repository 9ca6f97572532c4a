"""A session that is cut off goes on from its log, and runs nothing twice that must not run twice."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsv4.post_training.sandbox.interface import Sandbox, SandboxError, SandboxRefusal
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.replay import DivergenceError, FinishedError, InterruptedCommand, RecordedSandbox
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from tests.post_training.sandbox.conftest import EMPTY, SMALL


class Preempted(BaseException):
    """The machine goes away."""


@pytest.fixture
def ran() -> dict[str, int]:
    return {}


@pytest.fixture
def session(
    tmp_path: Path, ran: dict[str, int], kind: type[SupervisedSandbox]
) -> Iterator[Callable[..., RecordedSandbox]]:
    """Opens sessions on one log, as processes one after another would."""
    opened: list[RecordedSandbox] = []

    def make() -> Sandbox:
        made = kind(SMALL)  # pyright: ignore[reportCallIssue]

        def counted(command: Sequence[str] | str, **options: Any) -> Result:
            ran[str(command)] = ran.get(str(command), 0) + 1
            return run(command, **options)

        run, made.exec = made.exec, counted  # type: ignore[method-assign]
        return made

    def start(**options) -> RecordedSandbox:  # type: ignore[no-untyped-def]
        for old in opened:
            old.close()
        opened.append(RecordedSandbox(make, tmp_path / "session.jsonl", **options))
        return opened[-1]

    yield start
    for old in opened:
        old.close()


STEPS: list[Callable[[RecordedSandbox], object]] = [
    lambda box: box.put("in", b"one\n"),
    lambda box: box.exec("cat in >>log; cat log"),
    lambda box: box.exec("cat log", idempotent=True),
    lambda box: box.exec("date +%N >>log; tail -1 log"),
    lambda box: box.put("more", b"two\n"),
    lambda box: box.exec("cat more; wc -l <log >count", idempotent=True),
    lambda box: box.get("count"),
    lambda box: box.exec("cat log more"),
]
ONCE = ["cat in >>log; cat log", "date +%N >>log; tail -1 log", "cat log more"]


def test_a_session_cut_off_anywhere_gives_the_same_answers(
    session: Callable[..., RecordedSandbox], ran: dict[str, int]
) -> None:
    answers: list[object] = []
    for reached in range(1, len(STEPS) + 1):
        box = session()
        found = [step(box) for step in STEPS[:reached]]
        assert found[:-1] == answers and not box.replaying
        answers = found
    assert [ran[command] for command in ONCE] == [1, 1, 1]
    last = answers[-1]
    assert isinstance(last, Result) and last.stdout.startswith(b"one\n") and last.stdout.endswith(b"\ntwo\n")
    before = dict(ran)
    replayed = session()
    assert [step(replayed) for step in STEPS] == answers
    assert ran == before and replayed._live is None  # no sandbox was needed


def test_divergence_names_the_place(session: Callable[..., RecordedSandbox], tmp_path: Path) -> None:
    box = session()
    box.exec("echo one")
    box.exec("echo two", stdin=b"x")
    box = session()
    box.exec("echo one")
    with pytest.raises(DivergenceError, match="jsonl, step 1: the log has 'exec echo two', .* 'exec echo three'"):
        box.exec("echo three")
    with pytest.raises(DivergenceError, match="with other input or settings"):
        box.exec("echo two", stdin=b"y")
    assert box.exec("echo two", stdin=b"x").stdout == b"two\n"


def cut_off_within(box: RecordedSandbox, command: str, monkeypatch: pytest.MonkeyPatch, idempotent: bool) -> None:
    def dies(*_: object, **__: object) -> Result:
        raise Preempted

    with monkeypatch.context() as patch:
        patch.setattr(box._made(), "exec", dies)
        with pytest.raises(Preempted):
            box.exec(command, idempotent=idempotent)


def test_a_command_cut_off_is_not_run_again_unless_it_is_idempotent(
    session: Callable[..., RecordedSandbox], ran: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = session()
    box.exec("echo one >file")
    cut_off_within(box, "pay", monkeypatch, idempotent=False)
    box = session()
    box.exec("echo one >file")
    with pytest.raises(InterruptedCommand, match="step 1: 'exec pay' began in an earlier session"):
        box.exec("pay")
    for _ in range(2):  # the second time from the log
        box = session(interrupted="report")
        box.exec("echo one >file")
        assert box.exec("pay").describe() == "interrupted, outcome unknown"
    assert box.exec("cat file").stdout == b"one\n" and "pay" not in ran
    cut_off_within(box, "ls", monkeypatch, idempotent=True)
    box = session()
    box.exec("echo one >file")
    box.exec("pay")
    box.exec("cat file")
    assert box.exec("ls", idempotent=True).stdout == b"file\n"
    assert ran["cat file"] == ran["echo one >file"] == 1


def test_a_command_cut_off_runs_again_from_the_tree_before_it_where_it_may(
    session: Callable[..., RecordedSandbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = session(interrupted="again")
    box.exec("echo one >file")
    cut_off_within(box, "echo two >>file; cat file", monkeypatch, idempotent=False)
    for _ in range(2):  # the second time from the log
        box = session(interrupted="again")
        box.exec("echo one >file")
        assert box.exec("echo two >>file; cat file").stdout == b"one\ntwo\n"
    box.finish()
    box = session(interrupted="again")
    box.exec("echo one >file")
    assert box.exec("echo two >>file; cat file").stdout == b"one\ntwo\n"
    with pytest.raises(FinishedError, match="session.jsonl does not go on: snapshot .* is missing"):
        box.exec("cat file")


def test_a_line_cut_off_while_written_is_forgotten(
    session: Callable[..., RecordedSandbox], tmp_path: Path, ran: dict[str, int]
) -> None:
    box = session()
    box.exec("echo one")
    path = tmp_path / "session.jsonl"
    whole = path.read_bytes()
    box.close()
    for cut in (1, 20):
        path.write_bytes(whole + b'{"event": "began", "sequence": 1, "do"'[:-cut])
        box = session()
        assert box.exec("echo one").stdout == b"one\n" and not box.replaying
        assert path.read_bytes() == whole
        box.close()
    path.write_bytes(whole[:-30] + b"\n")
    with pytest.raises(SandboxError, match="line 3: not a record of a session"):
        session()


def test_every_record_has_its_number_and_hash(session: Callable[..., RecordedSandbox], tmp_path: Path) -> None:
    box = session()
    box.exec("echo one")
    box.put("a", b"x")
    lines = [json.loads(line) for line in (tmp_path / "session.jsonl").read_text().splitlines()]
    assert lines[0] == {"version": 1}
    assert [(line["event"], line["sequence"]) for line in lines[1:]] == [
        ("began", 0),
        ("ended", 0),
        ("began", 1),
        ("ended", 1),
    ]
    assert len(lines[1]["hash"]) == 64 and lines[1]["idempotent"] is False and lines[3]["idempotent"] is True


def test_refusals_and_snapshots_replay(session: Callable[..., RecordedSandbox], tmp_path: Path) -> None:
    def walk(box: RecordedSandbox) -> list[object]:
        box.put("a", b"1")
        first = box.snapshot()
        box.exec("echo 2 >a")
        with pytest.raises(SandboxError, match="No such file") as missing:
            box.get("b")
        with pytest.raises(SandboxError, match="does not name a file") as outside:
            box.put("../b", b"")
        box.restore(first)
        return [first, str(missing.value), str(outside.value), box.get("a")]

    answers = walk(session())
    assert answers[-1] == b"1"
    box = session()
    assert walk(box) == answers and box._live is None
    assert box.exec("cat a").stdout == b"1"
    for _ in range(5):
        box.exec("date +%N >a")
    kept = list((tmp_path / "session.snapshots").iterdir())
    assert len(kept) == 2  # the caller's, and the last
    assert EMPTY.digest not in {path.name for path in kept}


def fails_once(box: RecordedSandbox, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request of a kind to the live sandbox raises."""
    plain = getattr(box._made(), name)

    def failing(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(box._made(), name, plain)
        raise error

    monkeypatch.setattr(box._made(), name, failing)


def test_a_refused_command_is_refused_again_and_the_session_goes_on(
    session: Callable[..., RecordedSandbox], ran: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for live in (True, False):
        box = session(interrupted="again")
        if live:
            fails_once(box, "exec", SandboxRefusal("no cell"), monkeypatch)
        with pytest.raises(SandboxRefusal, match="no cell"):
            box.exec("pay")
        if live:
            fails_once(box, "snapshot", SandboxRefusal("no memory"), monkeypatch)
        with pytest.raises(SandboxRefusal, match="no memory"):
            box.snapshot()
        assert box.exec("echo one >>file; cat file").stdout == b"one\n"
        assert [command for command, _ in box.told()] == ["echo one >>file; cat file"]
    assert box._live is None and ran == {"echo one >>file; cat file": 1}


def test_a_command_that_failed_within_a_session_is_not_taken_for_one_that_was_cut_off(
    session: Callable[..., RecordedSandbox], ran: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = session(interrupted="again")
    fails_once(box, "exec", SandboxError("lost"), monkeypatch)
    with pytest.raises(SandboxError, match="lost"):
        box.exec("pay")
    box.exec("echo one >>file")
    box = session(interrupted="again")
    with pytest.raises(SandboxError, match="step 0: 'exec pay' failed before this session"):
        box.exec("pay")
    box.exec("echo one >>file")
    assert box.exec("cat file").stdout == b"one\n" and "pay" not in ran


def test_a_command_whose_files_cannot_be_kept_ends_the_sandbox(
    session: Callable[..., RecordedSandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = session(interrupted="again")
    box.exec("echo one >file")
    fails_once(box, "snapshot", SandboxRefusal("no memory"), monkeypatch)
    with pytest.raises(SandboxError, match="files after 'exec echo two >>file' cannot be kept: no memory"):
        box.exec("echo two >>file")
    with pytest.raises(SandboxError, match="the sandbox is closed"):
        box.get("file")
    box = session(interrupted="again")
    box.exec("echo one >file")
    with pytest.raises(SandboxError, match="failed before this session"):
        box.exec("echo two >>file")
    assert box.get("file") == b"one\n"


def test_a_tree_as_before_is_a_state_to_start_from_as_well(session: Callable[..., RecordedSandbox]) -> None:
    def walk(box: RecordedSandbox) -> None:
        box.exec("true")
        box.put("a", b"1")
        box.exec("rm a")

    walk(session())
    box = session()
    walk(box)
    assert box.exec("ls").stdout == b""


def test_an_empty_command_is_one_of_the_shell(session: Callable[..., RecordedSandbox]) -> None:
    box = session()
    with pytest.raises(ValueError, match="the command is empty"):
        box.exec([])
    assert box.exec("").ok and box._made().exec("").ok


FILLING = """
import os, resource, sys
from pathlib import Path
from dsv4.post_training.sandbox.log import SessionLog

path = Path(sys.argv[1])
log = SessionLog(path)
record = {"do": "exec", "asked": "x" * 1000}
log.end(log.begin(record), {"result": 1})
whole = path.stat().st_size
for room in (0, 500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + room, resource.RLIM_INFINITY))
    try:
        log.begin(record)
    except OSError as error:
        print(error.strerror, path.stat().st_size == whole, len(log))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.end(log.begin(record), {"result": 2})
log.close()
print([SessionLog(path).step(number).ended["result"] for number in range(2)])
"""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLING, str(tmp_path / "session.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.stdout == "File too large True 1\n" * 2 + "[1, 2]\n", done.stderr


def test_a_log_has_one_session_at_a_time(session: Callable[..., RecordedSandbox], tmp_path: Path) -> None:
    session()
    with pytest.raises(SandboxError, match="in use by another session"):
        RecordedSandbox(lambda: NamespaceSandbox(SMALL), tmp_path / "session.jsonl")


OWNER = """
import sys
from pathlib import Path
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.replay import RecordedSandbox

box = RecordedSandbox(lambda: NamespaceSandbox(Limits()), Path(sys.argv[1]), interrupted="report")
print("open", flush=True)
results = [box.exec(f"echo {i} >>log") for i in range(12)]
print([i for i, result in enumerate(results) if result.killed_by is None])
print(box.exec("cat log").stdout.split())
"""


@pytest.mark.slow
def test_an_owner_killed_at_any_moment_repeats_no_command(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    command = [sys.executable, "-c", OWNER, str(path)]
    generator = random.Random(0)
    for _ in range(12):
        owner = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
        assert owner.stdout is not None
        owner.stdout.readline()
        time.sleep(generator.random() * 1.5)
        owner.kill()
        owner.wait()
        owner.stdout.close()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    _, ended, lines = done.stdout.splitlines()
    assert [int(number) for number in re.findall("\\d+", lines)] == [
        int(number) for number in re.findall("\\d+", ended)
    ]
    began = [json.loads(line)["sequence"] for line in path.read_text().splitlines() if '"began"' in line]
    assert began == list(range(13))
