"""First process of a command's process namespace: waits for the command, starts it under its limits, reaps orphans."""

import ctypes
import os
import resource
import signal
import sys
from typing import Any

from dsv4.post_training.sandbox.inside import frames, landlock

PR_SET_DUMPABLE = 4
NOT_STARTED = 127


def main() -> None:
    control = int(sys.argv[1])
    set_dumpable(False)  # the command, of the same user, may not look into this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a handler, signals from inside do not reach process 1
    os.set_inheritable(control, False)
    frames.send(control, {"ready": True})
    message = frames.receive(control)
    if message is None:
        return
    order = message[0]
    child = os.fork()
    if child == 0:
        start(order, control)
    for stream in (0, 1, 2):
        os.close(stream)
    ended = -1
    while ended != child:
        ended, status = os.waitpid(-1, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = sum(1 for name in os.listdir("/proc") if name.isdigit() and name != "1" and running(name))
    report = {
        "status": status,
        "left_over": others,
        "processor": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * 1024,
    }
    frames.send(control, report)
    # The kernel ends all other processes of the namespace with this one.


def set_dumpable(value: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, int(value), 0, 0, 0)


def running(name: str) -> bool:
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def start(order: dict[str, Any], control: int) -> None:
    """Become the command; never returns. A command that cannot be executed is reported and exits with 127."""
    try:
        set_dumpable(True)  # or its files in /proc are not its own
        os.setsid()
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        os.chdir(order["directory"])
        landlock.restrict(order["readable"], order["writable"])
        for name, value in order["rlimits"]:
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(number, (value, value))
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(order["arguments"][0], order["arguments"], order["environment"])
    except BaseException as error:
        os.write(2, f"sandbox: cannot execute {order['arguments'][0]!r}: {error}\n".encode())
    finally:
        os._exit(NOT_STARTED)
