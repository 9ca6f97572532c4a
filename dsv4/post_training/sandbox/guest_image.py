"""Root files of a virtual machine, as the archive that a Linux kernel unpacks at its start (cpio, format newc)."""

import functools
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from dsv4.post_training.sandbox.inside.cell import CODE, PATH, program
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.trusted import code_folder, interpreter

MODULES = ("virtio_pci", "virtio_console")
# Programs of the machine that a guest without an image gets, where they are there.
PROGRAMS = (
    "bwrap sh bash [ arch b2sum base32 base64 basename cat chgrp chmod chown cksum comm cp csplit cut date dd df "
    "dir dirname du echo env expand expr factor false fmt fold groups head hostid id install join link ln logname "
    "ls md5sum mkdir mkfifo mknod mktemp mv nice nl nohup nproc numfmt od paste pathchk pr printenv printf ptx "
    "pwd readlink realpath rm rmdir seq sha1sum sha224sum sha256sum sha384sum sha512sum shred shuf sleep sort "
    "split stat stdbuf stty sum sync tac tail tee test timeout touch tr true truncate tsort tty uname unexpand "
    "uniq unlink wc who whoami yes awk bunzip2 bzip2 cmp diff diff3 egrep fgrep find free grep gunzip gzip "
    "hostname kill mount patch pgrep pkill ps sdiff sed setpriv su tar top unshare uptime xargs xz zcat"
)
LEFT_OUT = {
    *("test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"),
    *("dist-packages", "site-packages", f"config-{platform.machine()}"),
}
LARGEST = 2 << 30
BOOT = Path("/boot")


class Archive:
    """Archive being written; folders above an entry are made with it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._number = 0
        self._made: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._number += 1
        encoded = os.fsencode(name) + b"\0"
        fields = (self._number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + encoded, data):
            self._file.write(part + bytes(-len(part) % 4))

    def _claim(self, name: str) -> bool:
        """True if the name is new; its folders are made."""
        if name in self._made:
            return False
        parent = os.path.dirname(name)
        if parent:
            self.folder(parent)
        self._made.add(name)
        return True

    def folder(self, path: str, mode: int = 0o755) -> None:
        name = path.strip("/")
        if name and self._claim(name):
            self._entry(name, stat.S_IFDIR | mode, b"")

    def link(self, path: str, target: str) -> None:
        name = path.strip("/")
        if self._claim(name):
            self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        name = path.strip("/")
        if self._claim(name):
            self._entry(name, stat.S_IFREG | mode, data)

    def copy(self, source: str, path: str | None = None) -> None:
        """One file or link of the machine; what is neither, or may not be read, is left out."""
        found = os.lstat(source)
        if stat.S_ISLNK(found.st_mode):
            self.link(path or source, os.readlink(source))
        elif stat.S_ISREG(found.st_mode) and may_be_shown(source):
            self.file(path or source, Path(source).read_bytes(), shown_mode(found.st_mode))

    def tree(self, source: str, path: str, left_out: Iterable[str] = ()) -> None:
        """A folder of the machine, without the names that are left out."""
        for top, folders, files in os.walk(source):
            folders[:] = sorted(
                name for name in set(folders).difference(left_out) if may_be_shown(os.path.join(top, name))
            )
            inside = os.path.normpath(os.path.join(path, os.path.relpath(top, source)))
            self.folder(inside, shown_mode(os.stat(top).st_mode))
            for name in sorted(files) + [name for name in folders if os.path.islink(os.path.join(top, name))]:
                self.copy(os.path.join(top, name), os.path.join(inside, name))

    def close(self) -> None:
        self._entry("TRAILER!!!", 0, b"")
        self._file.write(bytes(-self._file.tell() % 512))


def may_be_shown(path: str) -> bool:
    """True if this user may read a file; for root, who may read all, if every user may. True for links."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return True
    return bool(found.st_mode & stat.S_IROTH) if os.getuid() == 0 else os.access(path, os.R_OK)


def shown_mode(mode: int) -> int:
    """Mode in a guest, where commands are not the owner: its rights for all, writing for the owner alone."""
    return (mode >> 6 & 0o7) * 0o111 & 0o755


def kernel() -> tuple[Path, str]:
    """A kernel of the machine that has, or has modules for, the devices of a guest; and its version.

    Root's hypervisor runs as another user, who has to be able to read it.
    """
    found = sorted(BOOT.glob("vmlinuz-*"), key=lambda path: ("cloud" in path.name, path.stat().st_mtime))
    for path in reversed(found):
        version = path.name.removeprefix("vmlinuz-")
        if may_be_shown(str(path)) and Path("/lib/modules", version, "modules.dep").exists():
            return path, version
    raise SandboxError(
        "no kernel for a virtual machine in /boot (Debian: apt-get install linux-image-cloud-amd64), "
        "or none that its user may read (Ubuntu: chmod 644 /boot/vmlinuz-*)"
    )


def modules(version: str) -> dict[str, bytes]:
    """Name -> contents of the modules that a guest loads, in this order; what is built in has none."""
    folder = Path("/lib/modules", version)
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {re.sub(r"\.ko.*", "", os.path.basename(path)).replace("-", "_"): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        for other in reversed(needs[path]):
            add(other)
        if path not in order:
            order.append(path)

    for name in MODULES:
        if name in by_name:
            add(by_name[name])
    return {f"{i:02}-{os.path.basename(path)}": _unpacked(folder / path) for i, path in enumerate(order)}


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise SandboxError(f"{path} is packed in a way that is not known here; .ko and .ko.xz are")
    return data


def libraries(programs: Iterable[str]) -> set[str]:
    """Shared libraries of programs, and the loader."""
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    return set(re.findall(r"(?:=> |^\t)(/\S+) \(0x", done.stdout, re.MULTILINE))


def add_machine(archive: Archive) -> None:
    """Python, a shell and common programs of this machine."""
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            archive.link(name, os.readlink(f"/{name}"))
    python = interpreter()
    names = [found for name in PROGRAMS.split() if (found := shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin"))]
    programs = {os.path.realpath(os.path.dirname(path)) + "/" + os.path.basename(path) for path in names}
    query = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    library = subprocess.run([python, "-I", "-S", "-c", query], capture_output=True, text=True, check=True).stdout
    library = library.strip()
    needed = {python, *(str(path) for path in Path(library, "lib-dynload").glob("*.so"))}
    for path in sorted(programs):
        needed.add(os.path.realpath(path))
        archive.copy(path)
        if os.path.islink(path):  # also through /etc/alternatives
            _copy_chain(archive, path)
    for path in sorted({os.path.realpath(os.path.dirname(p)) + "/" + os.path.basename(p) for p in libraries(needed)}):
        archive.copy(path)
        if os.path.islink(path):
            _copy_chain(archive, path)
    archive.copy(python)
    for name in ("python3", "python"):
        archive.link(f"{os.path.dirname(python)}/{name}", os.path.basename(python))
    archive.tree(library, library, LEFT_OUT)
    for path in ("/etc/ld.so.cache", "/etc/ld.so.conf"):
        if os.path.exists(path):
            archive.copy(path)


def _copy_chain(archive: Archive, path: str) -> None:
    """Each link from a path to the file at its end."""
    while os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
        folder = os.path.realpath(os.path.dirname(path))
        path = f"{folder}/{os.path.basename(path)}"
        archive.copy(path)


def write(file: IO[bytes], image: str | None, version: str) -> None:
    """Archive with the inner code, the modules that a guest loads, and the program that the kernel starts."""
    archive = Archive(file)
    for name in ("proc", "sys", "dev", "tmp", "etc", "work"):
        archive.folder(name)
    archive.tree(code_folder(), CODE)
    for name, data in modules(version).items():
        archive.file(f"run/dsv4-modules/{name}", data)
    first = interpreter() if image is None else f"/usr/bin/env -S PATH={PATH} python3"
    archive.file("init", f"#!{first} -IS\n{program('guest')[-1]}\n".encode(), 0o755)
    if image is None:
        add_machine(archive)
    else:
        archive.tree(image, "/")  # last: of two entries of a name the first holds, and images have an /init too
    archive.close()


@functools.cache
def built(image: str | None = None) -> Path:
    """Archive of an image's folder, or of this machine's programs; shared by processes of one user."""
    _, version = kernel()
    key = repr((code_folder(), version, image, Path(__file__).read_bytes()))
    path = Path(f"{code_folder()}-guest-{hashlib.sha256(key.encode()).hexdigest()[:8]}.cpio")
    if image is not None and not os.path.isdir(image):
        raise SandboxError(f"image {image!r} is not a folder; a virtual machine's is the root of its files")
    if image is None and path.is_file() and path.lstat().st_uid == os.getuid():
        return path
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="dsv4-sandbox-", delete=False) as file:
        try:
            write(file, image, version)
            if file.tell() > LARGEST:
                raise SandboxError(f"{image} has {file.tell()} bytes as an archive; a guest takes at most {LARGEST}")
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644 if os.getuid() == 0 else 0o600)  # root's hypervisor runs as another user
    os.rename(file.name, path)
    return path


def with_readable(base: Path, readable: Mapping[str, str], target: Path) -> None:
    """Archive of `base`, and after it one of folders of the machine; the kernel unpacks both."""
    with open(target, "wb") as file:
        with open(base, "rb") as start:
            shutil.copyfileobj(start, file)
        archive = Archive(file)
        for inside, path in readable.items():
            if os.path.isdir(path):
                archive.tree(os.path.realpath(path), inside)
            else:
                archive.copy(os.path.realpath(path), inside)
        archive.file("run/readable.json", json.dumps(list(readable)).encode())
        archive.close()
    target.chmod(0o644)
