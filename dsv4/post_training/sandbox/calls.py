"""Calls of one program's functions as unit tests, in one command: a fraction of what a command for each takes.

Each call has a process of its own, forked before the program is loaded, so that globals of one do not reach the next;
files do. Expected values stay outside, as in `unit_tests.py`: a program that looks at other calls, or at what they
left, still has to compute every answer.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from dsv4.post_training.sandbox.interface import Sandbox, SandboxRefusal
from dsv4.post_training.sandbox.result import Result, printable
from dsv4.post_training.sandbox.unit_tests import (
    ANSWER,
    DRIVER,
    PROGRAM,
    TIMES,
    CallTest,
    Score,
    TestOutcome,
    after_hangs,
    compared,
    out_of_time,
    shown,
)

LATE = 1.0  # seconds within which the driver notices a call's end; a call may have stopped it meanwhile

# After each call, a line: its exit code, a negative signal or null for one that hung, and the digest of its answer's
# file; NUL before its errors. No process of a call lives longer than it, and none may look into the driver, whose
# output would tell of the ends of others. After so many that hung it makes no more.
CALLS = """
import ctypes, hashlib, json, os, runpy, signal, stat, sys, time
DUMPABLE, CHILD_SUBREAPER = 4, 36
control = ctypes.CDLL(None).prctl
order = json.load(sys.stdin)
hung = 0

def digest(path):
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(file, "rb", buffering=0) as opened:
        if stat.S_ISREG(os.fstat(file).st_mode):
            return hashlib.sha256(opened.read(order["most"] + 1)).hexdigest()

control(DUMPABLE, 0, 0, 0, 0)
control(CHILD_SUBREAPER, 1, 0, 0, 0)
for number, (function, arguments) in enumerate(order["calls"]):
    answer = f"{order['answer']}.{number}"
    os.write(2, b"\\0")
    child = os.fork()
    if not child:
        control(DUMPABLE, 1, 0, 0, 0)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        found = runpy.run_path(order["program"], run_name="program")
        value = found[function](*arguments)
        with open(answer, "w") as file:
            json.dump(value, file)
        sys.exit()
    until, pause, status = time.monotonic() + order["seconds"], 0.0005, None
    while status is None:
        ended, how = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            status = how
        elif time.monotonic() >= until:
            break
        elif not ended:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
    if time.monotonic() > until + order["late"]:
        status = None
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    code = None if status is None else os.waitstatus_to_exitcode(status)
    os.write(1, json.dumps([code, digest(answer)]).encode() + b"\\n")
    hung += code is None
    if hung == order["hangs"]:
        break
"""


def run_calls(
    sandbox: Sandbox,
    program: str,
    tests: Sequence[CallTest],
    *,
    timeout: float,
    total: float = math.inf,
    hangs: float = math.inf,
) -> Score:
    """Score of a Python program by calls, in order; the sandbox has its files of before at the end.

    `timeout`: seconds per call; `total`: of all, past which those that are left are not `known`. `hangs`: calls that
    may reach a limit of time; those that are left then fail. Where the sandbox's limit of a command's time ends the
    calls, another command goes on with the one that it broke off. A program that fails, hangs or misbehaves fails its
    tests with the reason. SandboxError where the sandbox is lost.
    """
    if not tests:
        raise ValueError("no tests: a program without tests has no score")
    before = sandbox.snapshot()
    outcomes: list[TestOutcome] = []
    until, hung = time.monotonic() + total, 0
    while left := tests[len(outcomes) :]:
        seconds = until - time.monotonic()
        if hung >= hangs:
            outcomes += [after_hangs(test, hung) for test in left]
        elif seconds <= 0:
            outcomes += [out_of_time(test, total) for test in left]
        else:
            sandbox.put(PROGRAM, program.encode(errors="backslashreplace"))
            made, late = _command(sandbox, left, timeout, seconds, hangs - hung)
            sandbox.restore(before)
            outcomes += made
            hung += late
            if not made:
                until = time.monotonic()
    return Score(tuple(outcomes))


def _command(
    sandbox: Sandbox, tests: Sequence[CallTest], timeout: float, seconds: float, hangs: float
) -> tuple[list[TestOutcome], int]:
    """Outcomes of the calls that one command makes, from the first on, and how many hung; none: `seconds` were over."""
    calls = [(test.function, list(test.arguments)) for test in tests]
    order = {"program": PROGRAM, "answer": ANSWER, "seconds": timeout, "late": LATE, "calls": calls}
    order |= {"most": sandbox.limits.output_bytes, "hangs": None if math.isinf(hangs) else hangs}
    sandbox.put(DRIVER, CALLS.encode())
    result = sandbox.exec([sandbox.python, DRIVER], stdin=json.dumps(order).encode(), timeout=seconds)
    ends = [json.loads(line) for line in result.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
    errors = result.stderr.split(b"\0")[1:]
    outcomes: list[TestOutcome] = []
    for number, ((code, digest), test) in enumerate(zip(ends, tests, strict=False)):
        reason = _unfinished(code, b"".join(errors[number : number + 1]), timeout)
        if reason is None:
            reason = _answered(sandbox, test, number, digest)
        outcomes.append(TestOutcome(test.name, reason is None, reason or "passed"))
    hung, cut = sum(code is None for code, _ in ends), result.killed_by in TIMES
    if hung >= hangs or (cut and outcomes):
        return outcomes, hung
    if result.killed_by == "wall time" and seconds < sandbox.limits.wall_seconds:
        return [], 0
    reason = _cut_short(result, errors[-1] if errors else result.stderr)
    failed = tests[len(outcomes) :][: 1 if cut else None]
    return [*outcomes, *(TestOutcome(test.name, False, reason) for test in failed)], hung + cut


def _unfinished(code: int | None, errors: bytes, timeout: float) -> str | None:
    """Reason why a call gave no answer, from its exit code, or None where it hung; None if it ended well."""
    if code == 0:
        return None
    if code is None:
        return f"no answer within {timeout:g} s"
    return ": ".join([f"ended by signal {-code}" if code < 0 else f"exit code {code}", *_last_line(errors)])


def _cut_short(result: Result, errors: bytes) -> str:
    """Reason why a call was not made, or did not end before its command did."""
    how = "an earlier call ended the command" if result.ok else result.describe()
    return ": ".join([how, *_last_line(errors)])


def _last_line(errors: bytes) -> list[str]:
    return [shown(line) for line in printable(errors).strip().splitlines()[-1:]]


def _answered(sandbox: Sandbox, test: CallTest, number: int, digest: str | None) -> str | None:
    """Reason why a call's answer is wrong. `digest`: of the file when the call ended, which later ones may change."""
    try:
        data = sandbox.get(f"{ANSWER}.{number}", limit=sandbox.limits.output_bytes)
        if digest is None:
            return "no answer: no file could be read when the call had ended"
        if hashlib.sha256(data).hexdigest() != digest:
            return "no answer: its file was written after the call had ended"
        value: Any = json.loads(data)
    except (SandboxRefusal, ValueError, RecursionError) as error:
        return f"no answer: {error}"
    return compared(value, test)
