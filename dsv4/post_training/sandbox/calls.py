"""Calls of one program's functions as unit tests, in one command: a fraction of what a command for each takes.

Each call has a process of its own, forked before the program is loaded, so that globals of one do not reach the next;
files do. Expected values stay outside, as in `unit_tests.py`: a program that looks at other calls, or at what they
left, still has to compute every answer.
"""

import json
from collections.abc import Sequence
from typing import Any

from dsv4.post_training.sandbox.interface import Sandbox, SandboxRefusal
from dsv4.post_training.sandbox.result import Result, printable
from dsv4.post_training.sandbox.unit_tests import (
    ANSWER,
    DRIVER,
    PROGRAM,
    CallTest,
    Score,
    TestOutcome,
    compared,
    shown,
)

# After each call, a line with its exit code, a negative signal or null for one that hung; NUL before its errors.
CALLS = """
import json, os, runpy, signal, sys, time
order = json.load(sys.stdin)
for number, (function, arguments) in enumerate(order["calls"]):
    os.write(2, b"\\0")
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        found = runpy.run_path(order["program"], run_name="program")
        value = found[function](*arguments)
        with open(f"{order['answer']}.{number}", "w") as file:
            json.dump(value, file)
        sys.exit()
    until, pause = time.monotonic() + order["seconds"], 0.0005
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if not ended[0]:
        os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(ended[1]) if ended[0] else None), flush=True)
"""


def run_calls(sandbox: Sandbox, program: str, tests: Sequence[CallTest], *, timeout: float) -> Score:
    """Score of a Python program by calls, in order; the sandbox has its files of before at the end.

    `timeout`: seconds per call; all together have the sandbox's limits. A program that fails, hangs or misbehaves
    fails its tests with the reason. SandboxError where the sandbox is lost.
    """
    if not tests:
        raise ValueError("no tests: a program without tests has no score")
    before = sandbox.snapshot()
    sandbox.put(PROGRAM, program.encode(errors="backslashreplace"))
    sandbox.put(DRIVER, CALLS.encode())
    calls = [(test.function, list(test.arguments)) for test in tests]
    order = {"program": PROGRAM, "answer": ANSWER, "seconds": timeout, "calls": calls}
    result = sandbox.exec([sandbox.python, DRIVER], stdin=json.dumps(order).encode())
    ends, errors = result.stdout.splitlines(), result.stderr.split(b"\0")[1:]
    outcomes: list[TestOutcome] = []
    for number, test in enumerate(tests):
        if number < len(ends):
            reason = _unfinished(ends[number], b"".join(errors[number : number + 1]), timeout)
        else:
            reason = _cut_short(result, errors[-1] if errors else result.stderr)
        if reason is None:
            reason = _answered(sandbox, test, number)
        outcomes.append(TestOutcome(test.name, reason is None, reason or "passed"))
    sandbox.restore(before)
    return Score(tuple(outcomes))


def _unfinished(line: bytes, errors: bytes, timeout: float) -> str | None:
    """Reason why a call gave no answer, from the driver's line, which may be forged; None if it ended well."""
    end = line.decode(errors="replace")
    if end == "0":
        return None
    if end == "null":
        return f"no answer within {timeout:g} s"
    how = f"ended by signal {end[1:]}" if end.startswith("-") else f"exit code {end}"
    return ": ".join([shown(how), *_last_line(errors)])


def _cut_short(result: Result, errors: bytes) -> str:
    """Reason why a call was not made, or did not end before its command did."""
    how = "an earlier call ended the command" if result.ok else result.describe()
    return ": ".join([how, *_last_line(errors)])


def _last_line(errors: bytes) -> list[str]:
    return [shown(line) for line in printable(errors).strip().splitlines()[-1:]]


def _answered(sandbox: Sandbox, test: CallTest, number: int) -> str | None:
    try:
        value: Any = json.loads(sandbox.get(f"{ANSWER}.{number}", limit=sandbox.limits.output_bytes))
    except (SandboxRefusal, ValueError, RecursionError) as error:
        return f"no answer: {error}"
    return compared(value, test)
