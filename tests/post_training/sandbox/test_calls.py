"""Scores of programs by calls that share a command."""

import time
from dataclasses import replace

import pytest

from dsv4.post_training.sandbox.calls import run_calls
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from dsv4.post_training.sandbox.unit_tests import CallTest
from tests.post_training.sandbox.conftest import SMALL

TESTS = [CallTest(f"test {number}", "f", [number], 2 * number) for number in range(4)]


def reasons(sandbox: SupervisedSandbox, program: str, timeout: float = 5.0) -> list[str]:
    return [outcome.reason for outcome in run_calls(sandbox, program, TESTS, timeout=timeout).outcomes]


def test_a_right_program_passes_and_leaves_nothing(sandbox: SupervisedSandbox) -> None:
    sandbox.put("kept", b"1")
    assert run_calls(sandbox, "def f(x):\n    return 2 * x\n", TESTS, timeout=5.0).passed
    assert sandbox.exec("ls").stdout == b"kept\n"
    sandbox.exec("rm kept")


def test_each_call_loads_the_program_anew(sandbox: SupervisedSandbox) -> None:
    assert reasons(sandbox, "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)\n") == [
        f"wrong answer: expected {wanted}, got 1" for wanted in (0, 2, 4, 6)
    ]


def test_one_call_that_fails_fails_alone(sandbox: SupervisedSandbox) -> None:
    found = reasons(sandbox, "def f(x):\n    return [0, 2, 4][x]\n")
    assert found == ["passed", "passed", "passed", "exit code 1: IndexError: list index out of range"]
    found = reasons(sandbox, "import os\ndef f(x):\n    if x == 1: os.kill(os.getpid(), 11)\n    return 2 * x\n")
    assert found == ["passed", "ended by signal 11", "passed", "passed"]
    found = reasons(sandbox, "def f(x):\n    while x == 2: pass\n    return 2 * x\n", timeout=3.0)
    assert found == ["passed", "passed", "no answer within 3 s", "passed"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(:", "exit code 1: SyntaxError"),
        ("x = 1", "exit code 1: KeyError: 'f'"),
        ("import os; os._exit(0)", "no answer"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("x = bytearray(1 << 40)", "exit code 1: MemoryError"),
        ("def f(x): return object()", "not JSON serializable"),
        ("def f(x): return 2 * x + 1", "wrong answer: expected"),
        ("def f(x): return True", "wrong answer: expected"),
        ("import os\nfor n in range(4): open(f'answer.json.{n}', 'w').write('[')\nos._exit(0)", "no answer"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); signal.pause()", "ended by SIGKILL"),
        (
            "import os; os.write(os.open(f'/proc/{os.getppid()}/fd/1', 1), b'0\\n' * 9); os._exit(0)",
            "exit code 1: Permission",
        ),
        ("\ud800", "SyntaxError"),
    ],
)
def test_a_bad_program_fails_every_call_with_a_reason(sandbox: SupervisedSandbox, program: str, reason: str) -> None:
    for text in reasons(sandbox, program):
        assert pytest.raises(AssertionError, match=reason).matches(AssertionError(text)), text


def test_processes_of_a_call_end_with_it(sandbox: SupervisedSandbox) -> None:
    program = (
        "import os, time\n"
        "def f(x):\n"
        "    if not os.fork():\n"
        "        time.sleep(0.3)\n"
        "        open(f'answer.json.{x}', 'w').write('7')\n"
        "        os._exit(0)\n"
        "    if x == 3: time.sleep(0.6)\n"
        "    return 2 * x\n"
    )
    assert reasons(sandbox, program)[:3] == ["passed"] * 3


FORGERIES = {
    "a daemon answers later": (
        """
import os, time
def f(x):
    if x == 0:
        if os.fork():
            os._exit(0)
        os.setsid()
        time.sleep(1)
        open("answer.json.0", "w").write("0")
    time.sleep(1.5)
    return 2 * x
""",
        "no answer: ",
    ),
    "a later call answers": (
        """
import os
def f(x):
    if x == 0:
        os._exit(0)
    open("answer.json.0", "w").write("0")
    return 2 * x
""",
        "no answer: no file could be read when the call had ended",
    ),
    "a later call corrects": (
        """
def f(x):
    if x == 0:
        return 7
    open("answer.json.0", "w").write("0")
    return 2 * x
""",
        "no answer: its file was written after the call had ended",
    ),
    "a call stops the clock": (
        """
import os, signal, time
def f(x):
    if x == 0:
        if not os.fork():
            os.setsid()
            time.sleep(4)
            os.kill(DRIVER, signal.SIGCONT)
            os._exit(0)
        os.kill(DRIVER, signal.SIGSTOP)
        time.sleep(2.5)
    return 2 * x
DRIVER = os.getppid()
""",
        "no answer within 2 s",
    ),
    "output of the driver": (
        """
import os
def f(x):
    if x == 0:
        os.write(os.open(f"/proc/{os.getppid()}/fd/1", os.O_WRONLY), b'[0, ""]\\n')
    return 2 * x
""",
        "exit code 1: PermissionError: ",
    ),
    "memory of the driver": (
        """
import os
def f(x):
    if x == 0:
        os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY)
    return 2 * x
""",
        "exit code 1: PermissionError: ",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_call_has_its_own_time_alone(sandbox: SupervisedSandbox, name: str) -> None:
    program, reason = FORGERIES[name]
    first, *others = reasons(sandbox, program, timeout=2.0 if "clock" in name else 10.0)
    assert first.startswith(reason) and others == ["passed"] * 3


def test_a_program_sees_its_own_files_in_proc(sandbox: SupervisedSandbox) -> None:
    assert reasons(sandbox, "def f(x):\n    open('/proc/self/environ').read()\n    return 2 * x\n") == ["passed"] * 4


def test_a_call_that_takes_a_whole_command_fails() -> None:
    with NamespaceSandbox(replace(SMALL, wall_seconds=5.0)) as box:
        program = "import time\ndef f(x):\n    time.sleep(60 * x)\n    return 0\n"
        found = [outcome.reason for outcome in run_calls(box, program, TESTS, timeout=60.0, hangs=1).outcomes]
        limit = "ended by the sandbox: wall time over its limit; limits reached: wall_seconds"
        assert found == ["passed", limit, *["not run: 1 tests before it ran out of time"] * 2]


def test_one_command_runs_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    with NamespaceSandbox(SMALL) as box:
        ran: list[Result] = []
        run = box.exec

        def counted(*arguments: object, **options: object) -> Result:
            ran.append(run(*arguments, **options))  # pyright: ignore[reportArgumentType]
            return ran[-1]

        monkeypatch.setattr(box, "exec", counted)
        assert run_calls(box, "def f(x):\n    return 2 * x\n", TESTS, timeout=5.0).passed and len(ran) == 1
        with pytest.raises(ValueError, match="no tests"):
            run_calls(box, "", [], timeout=5.0)


def test_another_command_goes_on_where_the_sandboxs_limit_ended_one() -> None:
    """The second call takes longer than a command may, until the time of the first command is over."""
    with NamespaceSandbox(replace(SMALL, wall_seconds=6.0)) as box:
        late = f"x == 1 and time.monotonic() < {time.monotonic() + 6.0}"
        program = (
            f"import os, time\ndef f(x):\n    if {late}: time.sleep(60)\n    return [2 * x, os.listdir()].pop(0)\n"
        )
        assert reasons(box, program, timeout=60.0) == ["passed"] * 4


def test_after_so_many_that_hang_no_call_is_made(sandbox: SupervisedSandbox) -> None:
    score = run_calls(sandbox, "while True: pass", TESTS, timeout=0.3, hangs=2)
    assert [outcome.reason for outcome in score.outcomes] == [
        *["no answer within 0.3 s"] * 2,
        *["not run: 2 tests before it ran out of time"] * 2,
    ]
    assert all(outcome.known for outcome in score.outcomes)


def test_calls_for_which_no_time_is_left_are_not_known(sandbox: SupervisedSandbox) -> None:
    program = "import time\ndef f(x):\n    time.sleep(60 * x)\n    return 0\n"
    score = run_calls(sandbox, program, TESTS, timeout=60.0, total=3.0)
    assert [outcome.known for outcome in score.outcomes] == [True, False, False, False]
    assert {outcome.reason for outcome in score.outcomes[1:]} == {"not run: the tests before it took 3 s"}
