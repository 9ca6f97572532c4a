"""Programs that take memory, disk, descriptors, or flood their output."""

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from dsv4.post_training.sandbox.inside import landlock
from dsv4.post_training.sandbox.limits import MIB
from dsv4.post_training.sandbox.result import Result, printable
from tests.post_training.sandbox.conftest import SMALL, Attack

TOUCH = """
def touch(memory):
    for i in range(0, len(memory), 4096):
        memory[i] = 1
"""

ATTACKS = {
    "memory by malloc": Attack(
        "kept = []\nwhile True: kept.append(bytearray(b'x') * (1 << 20))",
        killed_by=[None, "memory"],  # by the sampled sum, or refused by the limit per process
        reached="memory_bytes",
    ),
    "memory by one request": Attack("refused(bytearray, 1 << 40)", says="refused: MemoryError"),
    "memory by private mmap": Attack(
        TOUCH + "import mmap\nrefused(lambda: touch(mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE)))",
        says="refused: OSError",
    ),
    "memory by shared mmap": Attack(
        TOUCH
        + """
import mmap
for flags in (mmap.MAP_SHARED, mmap.MAP_SHARED | 0x4000):
    refused(lambda: touch(mmap.mmap(-1, 1 << 29, flags=flags)))
""",
        says="refused: PermissionError[\\s\\S]*refused: PermissionError",
    ),
    "memory by many processes": Attack(
        TOUCH
        + """
for _ in range(15):
    if os.fork() == 0:
        touch(bytearray(30 << 20))
        time.sleep(5)
        os._exit(0)
time.sleep(5)
""",
        killed_by=["memory"],
        reached="memory_bytes",
    ),
    "memory of processes whose first thread has ended": Attack(
        TOUCH
        + """
import threading
def hold():
    time.sleep(1.5)
    kept = bytearray(100 << 20)
    touch(kept)
    time.sleep(25)
for _ in range(5):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        libc.syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
time.sleep(25)
""",
        killed_by=["memory"],
        reached="memory_bytes",
        limits=replace(SMALL, memory_bytes=64 * MIB),
    ),
    "memory by page tables": Attack(
        """
import mmap
kept = mmap.mmap(-1, 1 << 38, flags=mmap.MAP_PRIVATE | 0x4000, prot=mmap.PROT_READ)
for i in range(0, 1 << 38, 1 << 21):
    kept[i]
""",
        killed_by=["memory"],
    ),
    "memory by memfd": Attack('call("memfd_create", b"x", 0)', says="memfd_create refused"),
    "memory by System V segments": Attack('call("shmget", 0, 1 << 20, 0o1600)', says="shmget refused"),
    "memory by message queues": Attack(
        'call("msgget", 0, 0o1600); call("mq_open", b"q", 0o102, 0o600, 0)', says="mq_open refused"
    ),
    "memory by /dev/shm": Attack(
        """
refused(lambda: [open(f"/dev/shm/{i}", "wb").write(bytes(1 << 20)) for i in range(50)][-1:] and "filled")
""",
        says="No space left",
        reached="disk_bytes",
    ),
    "locked memory": Attack(
        """
memory = ctypes.create_string_buffer(1 << 20)
print("refused" if libc.mlock(memory, 1 << 20) else "ESCAPED")
""",
        says="refused",
    ),
    "memory by pipes": Attack(
        """
import fcntl
filled = 0
try:
    for _ in range(100):
        read, write = os.pipe()
        os.set_blocking(write, False)
        fcntl.fcntl(write, 1031, 1 << 20)
        try:
            while True:
                filled += os.write(write, bytes(1 << 16))
        except BlockingIOError:
            pass
except OSError as error:
    print("refused after", filled, error)
""",
        says="refused after \\d{1,8} ",
    ),
    "fills the disk": Attack(
        """
def fill():
    for i in range(100):
        with open(f"file{i}", "wb") as file:
            file.write(bytes(1 << 20))
    return "filled"
refused(fill)
""",
        says="No space left",
        reached="disk_bytes",
    ),
    "fills /tmp": Attack(
        """
def fill():
    for i in range(100):
        with open(f"/tmp/file{i}", "wb") as file:
            file.write(bytes(1 << 20))
    return "filled"
refused(fill)
""",
        says="No space left",
        reached="disk_bytes",
    ),
    "one huge file": Attack(
        """
with open("huge", "wb") as file:
    for _ in range(100):
        file.write(bytes(1 << 20))
print("ESCAPED")
""",
        says="File too large",
    ),
    "sparse files": Attack(
        """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
refused(lambda: open("sparse", "wb").truncate(1 << 40))
for i in range(50):
    os.truncate(os.open(f"s{i}", os.O_CREAT | os.O_RDWR), 4 << 20)
print("holes only")
""",
        says="refused: OSError.*File too large[\\s\\S]*holes only",
    ),
    "fallocate": Attack(
        """
file = os.open("a", os.O_CREAT | os.O_RDWR)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
refused(os.posix_fallocate, file, 0, 1 << 33)
""",
        says="refused: OSError",
    ),
    "many small files": Attack(
        'refused(lambda: [open(f"f{i}", "w").close() for i in range(5000)][:1])',
        says="No space left",
        reached="disk_files",
    ),
    "many hard links and names": Attack(
        """
open("a", "w").close()
refused(lambda: [os.link("a", f"l{i}") for i in range(5000)][:1])
""",
        says="No space left",
    ),
    "deep folders": Attack(
        """
depth = 0
try:
    for depth in range(3000):
        os.mkdir("d")
        os.chdir("d")
except OSError as error:
    print("refused after", depth, error)
""",
        says="refused after (1\\d\\d|200) .*No space left",
        reached="disk_files",
    ),
    "a file removed while open": Attack(
        """
kept = []
def fill():
    for i in range(50):
        file = open("x", "wb", buffering=0)
        os.unlink("x")
        file.write(bytes(1 << 20))
        kept.append(file)
    return "filled"
def loud():
    fill()
    if len(kept) * (1 << 20) > 5 << 20 and all(os.fstat(file.fileno()).st_size == 1 << 20 for file in kept):
        return "filled"
    raise OSError("No space left")
refused(loud)
""",
        says="No space left",
    ),
    "open files": Attack(
        'refused(lambda: [os.open("/dev/null", 0) for _ in range(1000)][:1])', says="Too many open files"
    ),
    "inotify": Attack(
        """
made = 0
while made < 5000 and libc.inotify_init() >= 0:
    made += 1
print("refused after", made)
""",
        says="refused after \\d{1,2}\\b",
    ),
    "pending signals and timers": Attack(
        """
made, timer = 0, ctypes.c_void_p()
while made < 20000 and libc.timer_create(1, None, ctypes.byref(timer)) == 0:
    made += 1
print("refused after", made)
""",
        says="refused after \\d{1,4}\\b",
    ),
    "output flood": Attack("while True: os.write(1, b'y' * 65536)", killed_by=["output"], reached="output_bytes"),
    "error flood": Attack("while True: os.write(2, b'y' * 65536)", killed_by=["output"], reached="output_bytes"),
    "more output than is kept": Attack("os.write(1, b'y' * 100000)", exit_code=0, reached="output_bytes"),
    "huge argument list": Attack(
        """
refused(subprocess.run, ["true", *["x" * 100000] * 100])
refused(os.execve, "/bin/true", ["true"], {"A": "x" * (1 << 20)})
""",
        says="Argument list too long",
    ),
    "compression bomb": Attack(
        """
import zlib
packer, parts = zlib.compressobj(1), []
for _ in range(150):
    parts.append(packer.compress(bytes(1 << 20)))
parts.append(packer.flush())
refused(lambda: len(zlib.decompress(b"".join(parts)) * 2))
""",
        killed_by=[None, "memory"],
        reached="memory_bytes",
    ),
    "pattern that backtracks": Attack(
        "import re; re.match('(a|a)*$', 'a' * 60 + 'b')", timeout=1.0, killed_by=["wall time"]
    ),
    "crash": Attack("ctypes.string_at(0)", signal=signal.SIGSEGV),
}


if landlock.version():
    ATTACKS["memory by shared mappings of /dev/zero"] = Attack(
        """
import mmap
refused(os.open, "/dev/zero", os.O_RDWR)
zero = os.open("/dev/zero", os.O_RDONLY)
refused(mmap.mmap, zero, 1 << 20)
print(os.read(zero, 2))
""",
        says=r"refused: PermissionError[\s\S]*refused: PermissionError[\s\S]*b'\\x00\\x00'",
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_stays_in(name: str, run_attack: Callable[[Attack], Result]) -> None:
    run_attack(ATTACKS[name])


def test_binary_output_comes_back_as_it_is(run_attack: Callable[[Attack], Result]) -> None:
    source = "os.write(1, bytes(range(256))); os.write(2, b'\\xff\\xfe')"
    result = run_attack(Attack(source, exit_code=0))
    assert result.stdout == bytes(range(256)) and result.stderr == b"\xff\xfe"


def test_terminal_escapes_are_shown_and_not_obeyed(run_attack: Callable[[Attack], Result]) -> None:
    result = run_attack(Attack(r"""sys.stdout.write("\x1b]0;title\x07\x1b[2J\u202e ok\n")"""))
    assert b"\x1b[2J" in result.stdout
    assert result.text == "\\x1b]0;title\\x07\\x1b[2J\\x202e ok\n"
    assert printable(b"\xff\x00\tb\n") == "\\xff\\x00\tb\n"


def test_output_kept_is_the_beginning(run_attack: Callable[[Attack], Result]) -> None:
    result = run_attack(Attack("os.write(1, b'a' * 65536 + b'b' * 10)"))
    assert result.stdout == b"a" * 65536 and result.stdout_bytes == 65546
    assert "output cut, 65546 bytes were written" in result.describe()
