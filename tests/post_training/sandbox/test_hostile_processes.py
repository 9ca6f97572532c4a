"""Programs that multiply, hide, outlive, kill, or spin."""

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from dsv4.post_training.sandbox.result import Result
from tests.post_training.sandbox.conftest import SMALL, Attack

SPIN = replace(SMALL, processor_seconds=0.4)

ATTACKS = {
    "fork bomb": Attack(
        """
for _ in range(12):
    try:
        os.fork()
    except OSError:
        pass
time.sleep(5)  # the supervisor looks every now and then
""",
        reached="processes",
        killed_by=(None, "memory"),  # so many interpreters are near both limits
    ),
    "fork bomb of the shell": Attack(
        """
subprocess.run(["sh", "-c", "n=0; f() { n=$((n+1)); [ $n -lt 12 ] && { f & f & sleep 0.5; }; }; f"])
""",
        says="[Cc]annot fork",
    ),
    "thread bomb": Attack(
        """
import threading
started = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError as error:
    print("refused after", started, error, flush=True)
    time.sleep(5)  # the supervisor looks every now and then
os._exit(0)
""",
        says="refused after (1\\d|2[0-4]) ",
        reached="processes",
    ),
    "zombie flood": Attack(
        """
made = 0
try:
    for _ in range(500):
        if os.fork() == 0:
            os._exit(0)
        made += 1
except OSError as error:
    print("refused after", made, error)
time.sleep(0.3)
""",
        says="refused after (1\\d|2[0-4]) ",
    ),
    "daemon that outlives": Attack(
        """
if os.fork() == 0:
    os.setsid()
    for stream in (0, 1, 2):
        os.close(stream)
    time.sleep(100)
    os._exit(0)
print("gone on")
time.sleep(0.1)
""",
        says="gone on",
        left_over=1,
    ),
    "double fork": Attack(
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(100)
    os._exit(0)
os.wait()
""",
        left_over=1,
    ),
    "holds its output open": Attack(
        'subprocess.Popen(["sleep", "100"]); print("done", flush=True); time.sleep(0.1)', says="done", left_over=1
    ),
    "ignores SIGTERM": Attack(
        """
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(100)
""",
        timeout=1.0,
        killed_by=["wall time"],
        reached="wall_seconds",
    ),
    "sleeps forever": Attack("time.sleep(1e6)", timeout=0.4, killed_by=["wall time"], reached="wall_seconds"),
    "waits for input": Attack('print("end:", sys.stdin.read() == "")', says="end: True"),
    "stops itself": Attack(
        "os.kill(os.getpid(), signal.SIGSTOP); print('woken')", timeout=0.8, killed_by=["wall time"]
    ),
    "spins": Attack("while True: pass", killed_by=["processor time"], reached="processor_seconds", limits=SPIN),
    "spins in many processes": Attack(
        """
for _ in range(3):
    os.fork()
while True:
    pass
""",
        killed_by=["processor time"],
        reached="processor_seconds",
        limits=SPIN,
    ),
    "spins in children that it does not wait for": Attack(
        """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(60):
    if os.fork() == 0:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        os._exit(0)
    try:
        os.wait()  # until it is gone
    except ChildProcessError:
        pass
""",
        killed_by=["processor time"],
        reached="processor_seconds",
        limits=SPIN,
    ),
    "kills all": Attack("os.kill(-1, signal.SIGKILL); print('alone')", says="alone|ProcessLookupError"),
    "kills its parent": Attack(
        """
for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    refused(os.kill, os.getppid(), number)
""",
        says="refused: PermissionError",
    ),
    "kills a process outside": Attack(
        "refused(os.kill, OUTER, signal.SIGKILL); refused(os.killpg, OUTER, signal.SIGKILL)",
        says="refused: ProcessLookupError",
    ),
    "dies of a signal": Attack("os.abort()", signal=signal.SIGABRT),
    "dumps core": Attack(
        """
refused(__import__("resource").setrlimit, 4, (1 << 20, 1 << 20))
if os.fork() == 0:
    os.abort()
os.wait()
print(sorted(os.listdir(".")))
""",
        says=r"\[\]",
    ),
    "raises its limits": Attack(
        """
import resource
for name in ("NPROC", "DATA", "FSIZE", "NOFILE", "CPU", "CORE", "MEMLOCK", "RTPRIO"):
    number = getattr(resource, "RLIMIT_" + name)
    refused(resource.setrlimit, number, (resource.getrlimit(number)[1] + 1,) * 2)
""",
        says="refused: ValueError",
    ),
    "takes real-time priority": Attack(
        """
refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))
refused(os.setpriority, os.PRIO_PROCESS, 0, -10)
""",
        says="refused: PermissionError",
    ),
    "hides from the killer of the last resort": Attack(
        'refused(lambda: open("/proc/self/oom_score_adj", "w").write("-1000"))', says="refused: PermissionError"
    ),
    "sends every signal to every process number": Attack(
        """
counted = 0
for pid in range(1, 3000):
    if pid != os.getpid():
        try:
            os.kill(pid, 9)
            counted += 1
        except OSError:
            pass
print("reached", counted)
""",
        says="reached 0",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_stays_in(name: str, run_attack: Callable[[Attack], Result]) -> None:
    run_attack(ATTACKS[name])
