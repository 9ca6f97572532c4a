"""Archive of a file tree that hostile programs have written: any depth, any name, holes kept, links not followed.

An archive is a line of JSON, the list of steps, and the data. The walk changes folder step by step, so that neither the
length of a path nor the number of open descriptors bounds the depth.
"""

import errno
import json
import os
import stat
from typing import Any

Step = dict[str, Any]


def enter(top: str) -> None:
    """Change to a folder, of which a command may have taken its owner's rights."""
    os.chmod(top, 0o700)
    os.chdir(top)


def pack(top: str) -> bytes:
    """Archive of the folder's contents; sockets are left out."""
    steps: list[Step] = []
    data: list[bytes] = []
    linked: dict[int, int] = {}  # inode -> number of the file among files with several names
    enter(top)
    pending = [sorted(os.listdir("."), reverse=True)]
    entered: list[Step] = []
    while pending:
        if not pending[-1]:
            pending.pop()
            if entered:
                os.chdir("..")  # before the mode is set back: it may forbid to leave
                os.chmod(entered[-1]["name"], entered.pop()["mode"])
                steps.append({"up": True})
            continue
        name = pending[-1].pop()
        found = os.lstat(name)
        step: Step = {"name": name, "mode": stat.S_IMODE(found.st_mode)}
        if stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
            step["time"] = found.st_mtime_ns
        if stat.S_ISDIR(found.st_mode):
            os.chmod(name, 0o700)
            os.chdir(name)
            entered.append(step)
            pending.append(sorted(os.listdir("."), reverse=True))
            steps.append(step | {"kind": "folder"})
        elif stat.S_ISLNK(found.st_mode):
            steps.append(step | {"kind": "link", "target": os.readlink(name)})
        elif stat.S_ISFIFO(found.st_mode):
            steps.append(step | {"kind": "pipe"})
        elif stat.S_ISREG(found.st_mode):
            if found.st_nlink > 1:
                if found.st_ino in linked:
                    steps.append(step | {"kind": "same", "number": linked[found.st_ino]})
                    continue
                linked[found.st_ino] = step["number"] = len(linked)
            extents = _read(name, step["mode"], data)
            steps.append(step | {"kind": "file", "size": found.st_size, "extents": extents})
    os.chdir("/")
    return json.dumps(steps).encode() + b"\n" + b"".join(data)


def _read(name: str, mode: int, data: list[bytes]) -> list[tuple[int, int]]:
    """Append a file's data without its holes; (offset, length) of each part."""
    os.chmod(name, mode | 0o400)
    extents: list[tuple[int, int]] = []
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(file, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return extents
                raise
            end = os.lseek(file, start, os.SEEK_HOLE)
            content = os.pread(file, end - start, start)
            extents.append((start, len(content)))
            data.append(content)
    finally:
        os.close(file)
        os.chmod(name, mode)


def unpack(top: str, archive: bytes) -> None:
    """Fill the empty folder `top`."""
    line = archive.index(b"\n")
    position = line + 1
    numbered: dict[int, int] = {}  # number of a file with several names -> descriptor
    entered: list[Step] = []
    enter(top)
    for step in json.loads(archive[:line]):
        if "up" in step:
            folder = entered.pop()
            os.chdir("..")
            os.chmod(folder["name"], folder["mode"])
            os.utime(folder["name"], ns=(folder["time"], folder["time"]))
            continue
        name, kind = step["name"], step["kind"]
        if kind == "folder":
            os.mkdir(name, 0o700)
            os.chdir(name)
            entered.append(step)
        elif kind == "link":
            os.symlink(step["target"], name)
        elif kind == "pipe":
            os.mkfifo(name, step["mode"])
        elif kind == "same":
            file = numbered[step["number"]]
            os.link(
                f"/proc/self/fd/{file}", name, src_dir_fd=file, follow_symlinks=True
            )  # followed only with src_dir_fd
        else:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(file, step["size"])
            for offset, length in step["extents"]:
                content = memoryview(archive)[position : position + length]
                position += length
                while content:
                    written = os.pwrite(file, content, offset)
                    content, offset = content[written:], offset + written
            os.fchmod(file, step["mode"])
            os.utime(file, ns=(step["time"], step["time"]))
            if "number" in step:
                numbered[step["number"]] = file
            else:
                os.close(file)
    for file in numbered.values():
        os.close(file)
    os.chdir("/")


def clear(top: str) -> None:
    """Remove all that is in a folder."""
    enter(top)
    pending = [os.listdir(".")]
    folders: list[str] = []
    while pending:
        if not pending[-1]:
            pending.pop()
            if folders:
                os.chdir("..")
                os.rmdir(folders.pop())
            continue
        name = pending[-1].pop()
        if stat.S_ISDIR(os.lstat(name).st_mode):
            os.chmod(name, 0o700)
            os.chdir(name)
            folders.append(name)
            pending.append(os.listdir("."))
        else:
            os.unlink(name)
    os.chdir("/")
