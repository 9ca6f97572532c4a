"""Programs that reach for files, devices, processes and networks of the machine."""

import socket
from collections.abc import Callable

import pytest

from dsv4.post_training.sandbox.calls import run_calls
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from dsv4.post_training.sandbox.unit_tests import CallTest, run_unit_tests
from tests.post_training.sandbox.conftest import EMPTY, Attack, Outside

ATTACKS = {
    "reads a file outside": Attack("refused(lambda: open(SECRET).read())", says="refused: FileNotFoundError"),
    "writes a file outside": Attack(
        "refused(lambda: open(SECRET, 'w').write('x')); refused(os.truncate, SECRET, 0); refused(os.unlink, SECRET)",
        says="refused: FileNotFoundError",
    ),
    "reads accounts": Attack(
        """
refused(lambda: open("/etc/shadow").read())
print([line.split(":")[0] for line in open("/etc/passwd")])
""",
        says=r"\['sandbox'\]",
    ),
    "looks for homes and mounts": Attack(
        'print([os.path.exists(path) for path in ("/root", "/home", "/var", "/mnt", "/sys", "/boot", "/srv", "/opt")])',
        says=r"\[(False, ){7}False\]",
    ),
    "writes the system": Attack(
        """
for path in ("/usr/bin/x", "/bin/true", "/etc/passwd", "/x", "/dev/x", "/run/x", "/box/x", "/proc/x"):
    refused(open, path, "w")
refused(os.unlink, "/usr/bin/env")
refused(os.chmod, "/usr/bin/env", 0o777)
refused(os.rename, "/usr", "/work/usr")
""",
        says="refused",
    ),
    "symbolic link out": Attack(
        'os.symlink(SECRET, "link"); refused(lambda: open("link").read())', says="refused: FileNotFoundError"
    ),
    "hard link of a system file": Attack(
        'refused(os.link, "/usr/bin/env", "link"); refused(os.link, "/etc/passwd", "link")',
        says="refused: (OSError|Perm)",
    ),
    "dots to the top": Attack(
        'refused(lambda: open("../" * 50 + SECRET[1:]).read())', says="refused: FileNotFoundError"
    ),
    "root through /proc": Attack(
        """
for pid in ("self", "1", str(os.getppid()), str(OUTER)):
    refused(lambda: open(f"/proc/{pid}/root{SECRET}").read())
    refused(lambda: open(f"/proc/{pid}/cwd/../../../../{SECRET}").read())
""",
        says="refused: PermissionError",
    ),
    "memory of process 1": Attack(
        """
for name in ("mem", "environ", "maps", "fd", "auxv", "io", "syscall", "stack"):
    refused(lambda: os.listdir("/proc/1/fd") if name == "fd" else open("/proc/1/" + name, "rb").read(1))
""",
        says="refused: PermissionError",
    ),
    "processes outside": Attack(
        'print("numbers", sorted(int(name) for name in os.listdir("/proc") if name.isdigit()), os.getppid())',
        says=r"numbers \[1, \d\] 1",
    ),
    "kernel settings": Attack(
        """
for path in ("sys/kernel/core_pattern", "sys/kernel/hostname", "sys/vm/drop_caches", "sys/user/max_user_namespaces",
             "sysrq-trigger", "self/uid_map", "self/setgroups", "1/oom_score_adj"):
    refused(lambda: open("/proc/" + path, "w").write("1"))
""",
        says="refused",
    ),
    "kernel memory and log": Attack(
        'refused(lambda: open("/proc/kcore", "rb").read(1)); refused(lambda: open("/proc/kmsg", "rb").read(1))',
        says="refused",
    ),
    "/sys": Attack(
        'refused(os.listdir, "/sys"); refused(open, "/sys/power/state", "w")', says="refused: FileNotFoundError"
    ),
    "control groups": Attack(
        """
refused(os.mkdir, "/sys/fs/cgroup/x")
refused(lambda: open("/sys/fs/cgroup/cgroup.procs", "w").write(str(os.getpid())))
call("mount", b"none", b"/work", b"cgroup2", 0, None)
""",
        says="mount refused",
    ),
    "device nodes": Attack(
        """
refused(os.mknod, "disk", 0o60600, os.makedev(254, 0))
refused(os.mknod, "memory", 0o20600, os.makedev(1, 1))
print(sorted(os.listdir("/dev")))
""",
        says=r"'full', 'null', 'ptmx', 'pts', 'random', 'shm', 'stderr', 'stdin', 'stdout', 'tty', 'urandom', 'zero'",
    ),
    "set-user-id programs": Attack(
        """
for path in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount", "/usr/bin/sudo"):
    if os.path.exists(path):
        os.system(f"{path} --help >/dev/null 2>&1")
open("own", "w").write("#!/bin/sh")
os.chmod("own", 0o6755)
subprocess.run(["cp", "/usr/bin/id", "id"])
os.chmod("id", 0o4755)
print("user", subprocess.run(["./id", "-u"], capture_output=True).stdout)
refused(os.setuid, 0)
refused(os.chown, "id", 0, 0)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))])
""",
        says=r"user b'1000\\n'[\s\S]*\['0000000000000000', '0000000000000000', '1'\]",
    ),
    "inherited descriptors": Attack("print(sorted(os.listdir('/proc/self/fd')))", says=r"\['0', '1', '2', '3'\]"),
    "secrets of the environment": Attack(
        'print(sorted(set(os.environ) - {"LC_CTYPE", "PWD"}))', says=r"\['HOME', 'LANG', 'PATH', 'TMPDIR'\]"
    ),
    "network by TCP": Attack(
        """
for address in (("1.1.1.1", 80), ("10.0.0.1", 80), ("127.0.0.1", PORT), ("169.254.169.254", 80)):
    refused(socket.create_connection, address, 2)
refused(socket.create_connection, ("::1", PORT), 2)
""",
        says="refused: OSError.*Network is unreachable[\\s\\S]*ConnectionRefused",
    ),
    "network by UDP": Attack(
        's = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); refused(s.sendto, b"x", ("1.1.1.1", 53))',
        says="refused: OSError.*unreachable",
    ),
    "names": Attack('refused(socket.getaddrinfo, "example.com", 80)', says="refused: gaierror"),
    "network by abstract socket": Attack(
        """
s = socket.socket(socket.AF_UNIX)
for pid in range(1, 5):
    refused(s.connect, f"\\0dsv4-outside-{OUTER - pid}")
print(open("/proc/net/unix").read().count("@"))
""",
        says="\n0$",
    ),
    "network by netlink and raw sockets": Attack(
        """
refused(socket.socket, 16, socket.SOCK_RAW, 0)
refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
refused(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)
refused(socket.socket, 40, socket.SOCK_STREAM, 0)
refused(socket.socket, 38, socket.SOCK_SEQPACKET, 0)
""",
        says="refused: OSError.*Address family",
    ),
    "shared sockets of the system": Attack(
        """
for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket", "/dev/log", "/run/systemd/x"):
    refused(socket.socket(socket.AF_UNIX).connect, path)
""",
        says="refused: (FileNotFound|Permission)",
    ),
    "its own launcher's code": Attack(
        'refused(open, "/run/sandbox/dsv4/post_training/sandbox/inside/launcher.py", "a")', says="refused"
    ),
    "timing": Attack(
        'print("ticks", time.perf_counter_ns() > 0); refused(lambda: open("/proc/timer_list").read())',
        says="ticks True",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_stays_in(name: str, run_attack: Callable[[Attack], Result]) -> None:
    run_attack(ATTACKS[name])


# Programs that leave a trap for the owner, who then asks for the file "trap" -> reason of the refusal.
TRAPS = {
    "symbolic link": ("ln -s /etc/passwd trap", "trap", "Too many levels of symbolic links"),
    "symbolic link to the supervisor": ("ln -s /proc/self/fd/0 trap", "trap", "Too many levels of symbolic links"),
    "folder that is a link": ("ln -s /etc trap", "trap/passwd", "not a folder that can be entered"),
    "pipe that nobody writes": ("mkfifo trap", "trap", "not a regular file"),
    "folder": ("mkdir trap", "trap", "not a regular file"),
    "socket": (
        "/usr/bin/python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('trap')\" || mkfifo trap",
        "trap",
        "not a regular file|No such device",
    ),
    "file of a terabyte": ("truncate -s 3M trap", "trap", "3145728 bytes; at most 1000000"),
    "path upward": ("true", "../../etc/passwd", "does not name a file beneath /work"),
    "path from the root": ("true", "/etc/passwd", "does not name a file beneath /work"),
    "path that starts alike": ("true", "/worker/x", "does not name a file beneath /work"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_get_refuses_a_trap(name: str, sandbox: SupervisedSandbox) -> None:
    command, path, reason = TRAPS[name]
    sandbox.restore(EMPTY)
    sandbox.exec(command)
    with pytest.raises(SandboxError, match=reason):
        sandbox.get(path, limit=1_000_000)


def test_put_writes_through_no_link(sandbox: SupervisedSandbox, outside: Outside) -> None:
    sandbox.restore(EMPTY)
    sandbox.exec(
        "ln -s /proc/self/fd/1 a; touch x; ln x hard; mkfifo pipe; ln -s /tmp folder; mkdir full; touch full/x"
    )
    for name in ("a", "hard", "pipe"):
        sandbox.put(name, b"mine")
        assert sandbox.get(name) == b"mine"
    assert sandbox.get("x") == b""
    for path in ("folder/x", "full", "../x", "/etc/x", "", "a/b"):
        with pytest.raises(SandboxError, match="not a folder|does not name|cannot write"):
            sandbox.put(path, b"mine")
    with pytest.raises(SandboxError, match="No space left on device"):
        sandbox.put("big", bytes(5 << 20))
    outside.assert_unharmed(sandbox)


def test_names_that_confuse_come_back_as_they_were(sandbox: SupervisedSandbox) -> None:
    sandbox.restore(EMPTY)
    program = r"""
import os
for name in (b"new\nline", b"\xff\xfe", b"-rf", b" ", b"\x1b[2J", b"a" * 255, "é".encode(), b"'; touch x; '"):
    open(name, "wb").write(name)
os.mkdir(b"closed\xff", 0o700)
os.symlink(b"\xff\n", b"link")
open(b"closed\xff/unreadable", "wb").write(b"x")
os.chmod(b"closed\xff/unreadable", 0)
os.chmod(b"closed\xff", 0)
os.truncate(os.open("sparse", os.O_CREAT | os.O_RDWR), 1 << 20)
open("one", "wb").write(b"x")
os.link("one", "two")
os.mkfifo("pipe")
"""
    listing = (
        "import os\nfor top, folders, files in sorted(os.walk(b'.')): print(top, sorted(folders), sorted(files), "
        "[oct(os.lstat(top + b'/' + n).st_mode) for n in sorted(files + folders)])\n"
        "print(os.stat('one').st_nlink, os.stat('sparse').st_blocks)"
    )
    assert sandbox.exec([sandbox.python, "-c", program]).ok
    before = sandbox.exec([sandbox.python, "-c", listing])
    snapshot = sandbox.snapshot()
    assert sandbox.snapshot() == snapshot
    sandbox.restore(EMPTY)
    assert sandbox.exec("ls -A").stdout == b""
    sandbox.restore(snapshot)
    after = sandbox.exec([sandbox.python, "-c", listing])
    assert after.ok and after.stdout == before.stdout and b"2 0" in after.stdout
    assert sandbox.snapshot().digest == snapshot.digest


def test_depth_beyond_the_length_of_paths_is_kept_and_cleared(sandbox: SupervisedSandbox) -> None:
    sandbox.restore(EMPTY)
    program = "import os\nfor _ in range(150): os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('bottom', 'w').close()"
    assert sandbox.exec([sandbox.python, "-c", program]).ok
    snapshot = sandbox.snapshot()
    sandbox.restore(EMPTY)
    sandbox.restore(snapshot)
    assert sandbox.snapshot() == snapshot
    sandbox.restore(EMPTY)
    assert sandbox.exec("ls -A").stdout == b""


def test_servers_within_the_sandbox_work(sandbox: SupervisedSandbox) -> None:
    program = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: server.accept()[0].sendall(b"served"), daemon=True).start()
print(socket.create_connection(server.getsockname()).recv(10))
"""
    assert sandbox.exec([sandbox.python, "-c", program]).stdout == b"b'served'\n"
    assert socket.gethostname() != "sandbox" and sandbox.exec("hostname").stdout == b"sandbox\n"


@pytest.mark.parametrize("mode", ["0", "500"])
@pytest.mark.parametrize("folder", ["/work", "/tmp", "/dev/shm"])
def test_a_program_takes_no_folder_from_its_sandbox(sandbox: SupervisedSandbox, folder: str, mode: str) -> None:
    sandbox.restore(EMPTY)
    sandbox.put("kept", b"1")
    assert sandbox.exec(f"touch {folder}/x; chmod {mode} {folder}").ok
    before = sandbox.snapshot()
    assert sandbox.exec(f"cat kept; touch {folder}/y && chmod {mode} {folder}").stdout == b"1"
    sandbox.restore(before)
    assert sandbox.exec(f"chmod {mode} {folder}").ok and sandbox.get("kept") == b"1"
    assert sandbox.exec(f"chmod {mode} {folder}").ok
    sandbox.put("more", b"2")
    program = f"import os\nos.chmod({folder!r}, 0o{mode})\ndef f(x):\n    return x\n"
    tests = [CallTest("a call", "f", [1], 1)]
    for score in (run_calls(sandbox, program, tests, timeout=20.0), run_unit_tests(sandbox, program, tests)):
        assert score.passed == (folder != "/work"), score  # where the answer would have been
    assert sandbox.exec("cat kept more").stdout == b"12"
