"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")  # .<name>.<process id of the writer>.tmp
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """A file found no room. What stood under its name before stands there still."""


def write_atomically(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it over `path`; on error nothing is left.

    Raises DiskFullError where there is no room; `needed`, the bytes that the file takes, is for its message.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path, needed, written) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_disk_full(error: OSError) -> bool:
    """True where `error` says that a disk, a quota or a limit of file sizes is used up."""
    return error.errno in _FULL


def disk_full(path: Path, needed: int | None = None, written: int = 0) -> DiskFullError:
    """The error for `path`, which takes `needed` bytes (None: not known) and of which `written` found room."""
    size = f"{needed:,} bytes are needed" if needed is not None else f"more than {written:,} bytes are needed"
    free = shutil.disk_usage(path.parent).free
    before = "; what stood there before is unchanged" if path.exists() else ""
    return DiskFullError(errno.ENOSPC, f"no room to write {path}: {size}, {free:,} are free on its disk{before}")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files that killed writers left in `folder` -> their paths.

    Left alone: files whose writer, a process of this machine, still runs. Call it before this process writes there.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and not _runs(int(match[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _runs(process: int) -> bool:
    """True if another process of that id runs; this process's own id is that of an earlier one with the same."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
