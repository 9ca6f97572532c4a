"""Files beneath a folder that hostile programs have written: no link is followed, no pipe is waited for."""

import contextlib
import os
import stat


class Refused(Exception):
    """Path or file that is not read or written, with the reason."""


def parts_of(path: str, top: str) -> list[str]:
    """Names along a path beneath `top`; the path is relative, or starts with `top`."""
    relative = path[len(top) :] if path == top or path.startswith(top + "/") else path
    names = [name for name in relative.split("/") if name not in ("", ".")]
    if (path.startswith("/") and relative is path) or ".." in names or not names or "\0" in path:
        raise Refused(f"path {path!r} does not name a file beneath {top}")
    return names


def open_folder(top: str, names: list[str], make: bool) -> int:
    """Descriptor of a folder beneath `top`, of which a command may have taken its owner's rights."""
    os.chmod(top, 0o700)
    current = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in names:
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=current)
            following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
        except OSError as error:
            raise Refused(f"{name!r} is not a folder that can be entered: {error.strerror}") from None
        finally:
            os.close(current)
        current = following
    return current


def write(top: str, path: str, data: bytes, mode: int) -> None:
    """Write a file in place of what had its name, unless that is a folder."""
    *folders, name = parts_of(path, top)
    folder = open_folder(top, folders, make=True)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)  # never through a link, a hard link included
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=folder)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
            os.fchmod(file, mode & 0o777)
        finally:
            os.close(file)
    except OSError as error:
        raise Refused(f"cannot write {path!r}: {error.strerror}") from None
    finally:
        os.close(folder)


def read(top: str, path: str, limit: int) -> bytes:
    """Contents of a regular file of at most `limit` bytes."""
    *folders, name = parts_of(path, top)
    folder = open_folder(top, folders, make=False)
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise Refused(f"cannot read {path!r}: {error.strerror}") from None
    finally:
        os.close(folder)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{path!r} is not a regular file")
        if found.st_size > limit:
            raise Refused(f"{path!r} has {found.st_size} bytes; at most {limit} are read")
        with os.fdopen(os.dup(file), "rb") as opened:
            return opened.read()
    finally:
        os.close(file)
