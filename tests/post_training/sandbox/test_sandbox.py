"""The sandbox as its owner sees it: start, loss, end, pool."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsv4.post_training.sandbox import supervised, trusted
from dsv4.post_training.sandbox.cgroup import delegated
from dsv4.post_training.sandbox.inside import frames
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.limits import MIB
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.pool import Pool
from dsv4.post_training.sandbox.substrates import missing, open_sandbox
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from tests.post_training.sandbox.conftest import EMPTY, SMALL, Outside, inner_processes, pid_of, words


def assert_gone(family: list[psutil.Process]) -> None:
    """Every process of a sandbox ends; as a zombie it may wait for the machine's process 1."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    for _ in range(600):
        if not any(map(runs, family)):
            return
        time.sleep(0.05)
    raise AssertionError([words(process) for process in family if runs(process)])


def test_commands_share_files_and_nothing_else(sandbox: SupervisedSandbox) -> None:
    sandbox.restore(EMPTY)
    sandbox.put("folder/in", b"x" * 100_000)
    first = sandbox.exec("wc -c <folder/in >out; echo t >/tmp/t; echo s >/dev/shm/s; export A=1; cd /; sleep 50 &")
    assert first.ok and first.usage.disk_files == 5
    second = sandbox.exec("cat out /tmp/t; echo $A $PWD; ls /dev/shm; pgrep sleep")
    assert second.stdout == b"100000\nt\n/work\n" and sandbox.get("/work/out") == b"100000\n"


def test_input_environment_and_timeout(sandbox: SupervisedSandbox) -> None:
    data = os.urandom(300_000)
    result = sandbox.exec("sha1sum; echo $A", stdin=data, environment={"A": "b c"})
    assert result.text.split()[2:] == ["b", "c"]
    assert sandbox.exec("true", stdin=data).ok  # nobody reads the input
    started = time.monotonic()
    assert sandbox.exec("sleep 60", timeout=0.3).killed_by == "wall time"
    assert time.monotonic() - started < 20
    with pytest.raises(ValueError, match="the command is empty"):
        sandbox.exec([])
    assert sandbox.exec(["no such program"]).exit_code == 127


def test_usage_is_measured(sandbox: SupervisedSandbox) -> None:
    code = "import time\nkept = bytearray(b'x') * (30 << 20)\nwhile time.process_time() < 0.3: pass"
    usage = sandbox.exec([sandbox.python, "-c", code]).usage
    assert 0.25 < usage.processor_seconds < 5 and 30 * MIB < usage.memory_bytes < 90 * MIB
    assert usage.wall_seconds > 0.25 and usage.processes >= 1


def test_a_lost_sandbox_says_so_and_leaves_nothing() -> None:
    with NamespaceSandbox(SMALL) as box:
        family = psutil.Process(pid_of(box)).children(recursive=True)
        assert family
        os.kill(family[-1].pid if len(family) == 1 else family[1].pid, signal.SIGKILL)  # the supervisor
        with pytest.raises(SandboxError, match="the sandbox was lost"):
            box.exec("true")
        with pytest.raises(SandboxError, match="the sandbox is closed"):
            box.exec("true")
    assert_gone(family)


def test_a_sandbox_ends_with_its_owner(kind: type[SupervisedSandbox]) -> None:
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from {kind.__module__} import {kind.__name__} as Box\n"
            "from tests.post_training.sandbox.conftest import inner_processes\n"
            "box = Box()\n"
            "print(box._process.pid, *(process.pid for process in inner_processes(box)), flush=True)\n"
            "box.exec('sleep 60')",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert owner.stdout is not None
    family = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert_gone(family)


def test_closing_twice_is_allowed_and_ends_every_process(kind: type[SupervisedSandbox]) -> None:
    box = kind(SMALL)  # pyright: ignore[reportCallIssue]
    family = inner_processes(box)
    box.close()
    box.close()
    assert_gone(family)


def test_a_pool_gives_each_call_a_sandbox_of_its_own() -> None:
    with Pool(lambda: NamespaceSandbox(SMALL), size=2) as pool, ThreadPoolExecutor(3) as threads:
        command = "ls; cat in >out; cat out"
        results = list(threads.map(lambda i: pool.run(command, files={"in": b"%d" % i}), range(4)))
        assert [result.stdout for result in results] == [b"in\n%d" % i for i in range(4)]
    with pytest.raises(SandboxError, match="closed"):
        pool.take()
    with pytest.raises(ValueError, match="size is 0"):
        Pool(lambda: NamespaceSandbox(SMALL), size=0)


def test_a_pool_passes_on_that_no_sandbox_can_be_made() -> None:
    def fails() -> NamespaceSandbox:
        raise SandboxError("no room")

    with Pool(fails, size=1) as pool, pytest.raises(SandboxError, match="no room"):
        pool.run("true")


class Closable:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_pool_that_is_closed_tells_those_who_wait() -> None:
    made, goes_on = list[Closable](), threading.Event()

    def make() -> Any:
        goes_on.wait(60)
        made.append(Closable())
        return made[-1]

    pool = Pool(make, size=1)
    with ThreadPoolExecutor(3) as threads:
        takers = [threads.submit(pool.take) for _ in range(2)]
        while pool._threads._work_queue.qsize() < 2:  # the second taker's, and the next one's
            time.sleep(0.01)
        closing = threads.submit(pool.close)
        late = next(as_completed(takers, 60))
        goes_on.set()
        closing.result(60)
        with pytest.raises(SandboxError, match="the pool of sandboxes is closed"):
            late.result()
        takers.remove(late)
        assert takers[0].result(60) is made[0] and not made[0].closed and len(made) == 1


def test_an_interrupt_while_a_sandbox_is_made_loses_none() -> None:
    made = list[Closable]()

    def make() -> Any:
        made.append(Closable())
        return made[-1]

    with Pool(make, size=1) as pool:
        first: Any = pool._ready[0]

        def interrupted() -> None:
            del first.result
            raise KeyboardInterrupt

        first.result = interrupted
        with pytest.raises(KeyboardInterrupt):
            pool.take()
        wait([first], 60)
    assert made and all(box.closed for box in made)


def test_programs_may_share_memory_through_files(sandbox: SupervisedSandbox) -> None:
    """Without a file they may not, as only control groups count it: what Python's own modules need is none of it."""
    source = """
import mmap, multiprocessing
from multiprocessing import shared_memory
def work(total, name, pipe):
    block = shared_memory.SharedMemory(name)
    block.buf[0] = 7
    block.close()
    with total.get_lock():
        total.value += 1
    pipe.send("sent")
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    total, block = context.Value("i", 0), shared_memory.SharedMemory(create=True, size=1 << 16)
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(total, block.name, theirs))
    process.start()
    print(ours.recv())
    process.join()
    print(total.value, block.buf[0], context.Array("d", 3)[:])
    block.close()
    block.unlink()
    with context.Pool(2) as pool:
        print(pool.map(abs, [-1, -2]))
    with open("mapped", "w+b") as file:
        file.truncate(4096)
        mmap.mmap(file.fileno(), 0)[0] = 1
        print(file.read(1))
    mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)[0] = 1
"""
    sandbox.put("shares.py", source.encode())
    result = sandbox.exec([sandbox.python, "shares.py"])
    assert result.text.split("\n") == ["sent", "1 7 [0.0, 0.0, 0.0]", "[1, 2]", "b'\\x01'", ""], result
    sandbox.restore(EMPTY)


def test_a_snapshot_goes_to_another_sandbox(sandbox: SupervisedSandbox) -> None:
    sandbox.restore(EMPTY)
    sandbox.exec("echo 1 >a; mkdir b; ln -s ../a b/c; echo 2 >/tmp/d; chmod 750 b")
    snapshot = sandbox.snapshot()
    with open_sandbox("namespaces", SMALL) as other:
        other.put("x", b"")
        other.restore(snapshot)
        assert other.exec("ls; cat b/c /tmp/d; stat -c %a b").stdout == b"a\nb\n1\n2\n750\n"
        assert other.snapshot() == snapshot


def test_folders_of_the_machine_can_be_shown(outside: Outside) -> None:
    with open_sandbox(limits=SMALL, readable={"/opt/shown": str(outside.shown)}) as box:
        result = box.exec("cat /opt/shown/file; echo x >/opt/shown/new; echo x >>/opt/shown/file; ls /opt/shown")
        assert result.stdout == b"seenfile\n"
        assert isinstance(box, NamespaceSandbox)
        outside.assert_unharmed(box)
    for path in ("/work", "/work/x", "/tmp/x", "/", "/opt/../work", "relative", "../etc"):
        with pytest.raises(ValueError, match="cannot name a folder inside"):
            open_sandbox(limits=SMALL, readable={path: str(outside.shown)})


def test_choices_and_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown substrate 'magic'; known are namespaces, container, microvm"):
        open_sandbox("magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown substrate 'magic'"):
        missing("magic")  # type: ignore[arg-type]
    assert missing("namespaces") is None
    with pytest.raises(ValueError, match="processes is 0; a limit is above 0"):
        replace(SMALL, processes=0)


def test_a_cell_that_cannot_be_made_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "seccomp_filter", lambda: b"nonsense" * 3)
    with NamespaceSandbox(SMALL) as box:
        for _ in range(2):
            with pytest.raises(SandboxError, match="no cell for the command: bwrap: .*EINVAL"):
                box.exec("true")
        box.put("a", b"1")
        assert box.get("a") == b"1"


def test_a_waiting_cell_that_died_is_replaced(sandbox: SupervisedSandbox) -> None:
    if sandbox.name == "microvm":
        pytest.skip("processes of a guest are out of the machine's reach")
    assert sandbox.exec("true").ok
    for _ in range(100):
        inside = inner_processes(sandbox)
        waiting = [process for process in inside if "launcher" in str(words(process))]
        if waiting:
            break
        time.sleep(0.1)
    for process in waiting:
        if "bwrap" not in process.cmdline()[0]:
            process.kill()
            process.wait(20)
    time.sleep(0.2)
    assert sandbox.exec("echo again").stdout == b"again\n"


def test_an_interrupt_within_a_command_ends_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reply would otherwise answer the next request."""

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with NamespaceSandbox(SMALL) as box:
        with monkeypatch.context() as patch:
            patch.setattr(frames, "receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                box.exec("echo one")
        with pytest.raises(SandboxError, match="the sandbox is closed"):
            box.exec("echo two")


def test_layers_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    supervised.tell.cache_clear()
    with caplog.at_level("INFO", logger="dsv4"):
        for _ in range(2):
            with NamespaceSandbox(SMALL) as box:
                layers = box.layers
    said = [record.getMessage() for record in caplog.records]
    assert said == ["sandbox: namespaces: " + ", ".join(f"{layer} by {how}" for layer, how in layers.items())]
    assert (layers["memory and processes"] == "control group") == (delegated() is not None)


def test_the_inner_code_is_copied_once_and_trusted_only_if_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mask = os.umask(0o077)
    made = [trusted.code_folder.__wrapped__() for _ in range(2)]
    os.umask(mask)
    assert made[0] == made[1] and [str(path) for path in tmp_path.iterdir()] == made[:1]
    modes = {path.stat().st_mode & 0o777 for path in (Path(made[0]), *Path(made[0]).rglob("*"))}
    assert modes == {0o755, 0o644}
    Path(made[0]).chmod(0o777)
    with pytest.raises(SandboxError, match="is not this user's own folder"):
        trusted.code_folder.__wrapped__()
    Path(made[0]).rename(tmp_path / "elsewhere")
    Path(made[0]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SandboxError, match="is not this user's own folder"):
        trusted.code_folder.__wrapped__()


def test_missing_bubblewrap_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"bwrap is missing \(Debian: apt-get install bubblewrap\)"):
        NamespaceSandbox(SMALL)
