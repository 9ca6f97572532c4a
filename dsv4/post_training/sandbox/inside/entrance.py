"""Way into a sandbox: the command line of bubblewrap around the supervisor, made from the files that are there.

Namespaces start it on the machine itself; a container and a virtual machine run this module as their first program.
"""

import json
import os
import sys
from collections.abc import Mapping

from dsv4.post_training.sandbox.inside.cell import CODE, PATH, TREE, program

USER = 1000  # inside
DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
SYSTEM = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "ssl/certs")
ACCOUNTS = {
    "passwd": f"sandbox:x:{USER}:{USER}::/work:/bin/sh\n",
    "group": f"sandbox:x:{USER}:\n",
    "hosts": "127.0.0.1 localhost sandbox\n",
}
CHANNEL = 3  # descriptor over which a container talks to its owner


def arguments(code: str, readable: Mapping[str, str]) -> list[str]:
    """Command line up to the program. `readable`: path inside -> path outside. `code`: folder of the inner code."""
    command = [
        *("bwrap", "--unshare-all", "--unshare-user", "--uid", str(USER), "--gid", str(USER), "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session", "--clearenv", "--setenv", "PATH", PATH),
        *("--cap-add", "CAP_SYS_ADMIN"),  # for one mount; the supervisor then drops it
        *("--ro-bind", "/usr", "/usr", "--proc", "/proc"),
    ]
    for name in DEVICES:  # "--dev" would put the supervisor into a second user namespace, where it may not mount
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    for name in SYSTEM:
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name in ACCOUNTS:
        command += ["--ro-bind", f"{code}/etc/{name}", f"/etc/{name}"]
    for inside, path in readable.items():
        command += ["--ro-bind", path, inside]
    command += ["--ro-bind", code, CODE, "--dir", TREE, "--dir", "/work", "--dir", "/tmp", "--chdir", "/", "--"]
    return command


def prefix_of(python: str) -> dict[str, str]:
    """Folder of a Python outside of /usr, as a readable one."""
    prefix = os.path.dirname(os.path.dirname(python))
    return {} if prefix in ("/usr", "/usr/local") else {prefix: prefix}


def enter(readable: Mapping[str, str]) -> None:
    """Become bubblewrap and the supervisor, which talks over descriptors 0 and 1. Never returns."""
    python = os.path.realpath(sys.executable)
    command = [*arguments(CODE, {**readable, **prefix_of(python)}), python, *program("supervisor")]
    try:
        os.execvpe("bwrap", command, {"PATH": PATH})
    except FileNotFoundError:
        sys.exit("bwrap is missing inside (Debian: apt-get install bubblewrap in the image)")


def main() -> None:
    """First program of a container; the paths that commands may read are its argument, in JSON."""
    os.dup2(CHANNEL, 0)
    os.dup2(CHANNEL, 1)
    os.close(CHANNEL)
    enter({path: path for path in json.loads(sys.argv[1])})
