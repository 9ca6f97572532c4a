"""Files and folders that are whole or absent: written under a temporary name, synced, renamed.

A temporary file is hidden, beside the target, and locked while its writer lives. A killed writer leaves one without a
lock, which the next writer of the same target removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from dsv4.checkpoint.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """Not enough space on the disk, or within the limits of a user or a file, for the data to be written."""

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def new_file(target: Path, num_bytes: int | None = None) -> Generator[Path]:
    """A temporary file beside `target` to write to; it replaces `target` at the end, or vanishes on any error.

    A link stays, and what it leads to is replaced. A pipe, a terminal or /dev/null gets the bytes at the end, and so
    does the output of this process; CheckpointError for anything else that is no file. Raises DiskFullError if the disk
    is too small for the file; `num_bytes`, its size, is for the message.
    """
    if _takes_bytes(target):
        with TemporaryDirectory() as folder, space_in_words(Path(folder), num_bytes):
            temporary = Path(folder) / target.name
            temporary.touch()
            yield temporary
            _copy_into(temporary, target)
        return
    target = _followed(target)
    touch: Callable[[Path], object] = lambda path: path.touch(exist_ok=False)  # noqa: E731
    with _temporary(target, touch) as temporary, space_in_words(target, num_bytes):
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    sync_folder(target.parent)


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Generator[Path]:
    """A temporary folder beside `target` to write into; it becomes `target` at the end, or vanishes on any error.

    A non-empty target is refused, or with `overwrite` replaced whole if it is a model folder. A link stays, and the
    folder that it leads to is replaced; a mount point is refused. Raises DiskFullError if the disk is too small for the
    folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target = _followed(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(target, "the name of a folder", "a file")
    occupied = target.exists() and any(target.iterdir())
    if occupied and not overwrite:
        raise CheckpointError(
            target, "a new or empty folder (or --overwrite; in Python overwrite=True)", "something there already"
        )
    if occupied and not (target / "config.json").is_file():
        raise CheckpointError(target, "a model folder to overwrite", "one without config.json")
    with _temporary(target, Path.mkdir) as temporary, space_in_words(target):
        yield temporary
        sync_folder(temporary)
        replaced = temporary.with_suffix(".old")
        if occupied:
            target.rename(replaced)
        try:
            temporary.rename(target)
        except OSError:
            if occupied:
                replaced.rename(target)
            raise
        sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def kept_if_whole(folder: Path) -> Generator[None]:
    """Context in which a folder is filled: on an error what was put there is removed, and the folder if it is new.

    Ctrl-C leaves it as a kill does, for what was done to be gone on with.
    """
    before = set(folder.iterdir()) if folder.is_dir() else None
    try:
        yield
    except Exception:
        for path in set(folder.iterdir()) - (before or set()) if folder.is_dir() else ():
            _remove(path)
        if before is None and folder.is_dir():
            folder.rmdir()
        raise


@contextmanager
def sole_writer(folder: Path) -> Generator[None]:
    """Context in which no other process that asks for it works in a folder: ValueError if one does.

    The folder is made if need be, and goes at the end if it is still empty. It is locked while the process lives, which
    file systems without locks, and Windows, do not do.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _open_to_lock(folder)
    try:
        if descriptor is not None and _is_locked(descriptor):
            raise ValueError(f"another process works in {folder}; wait until it has ended, or give another folder")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_space(target: Path, num_bytes: int) -> None:
    """DiskFullError if `num_bytes` more do not fit beside `target`, or what it links to; a mount point is refused."""
    _refuse_mount_point(target)
    if not target.is_dir() and _takes_bytes(target):
        place = Path(gettempdir())  # where new_file collects them
    else:
        place = next(folder for folder in target.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        needed = f"no space left on the disk: it takes {_size(num_bytes)}, and {_size(free)} are free in {place}"
        raise DiskFullError(errno.ENOSPC, f"{target} cannot be written: {needed}")


def clear_leftovers(target: Path) -> None:
    """Remove leftovers of killed writers of `target`; a folder that such a writer was replacing is restored."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.(tmp|old)")
    found = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    for path in found:
        if path.suffix == ".tmp":
            _remove_abandoned(path)
    for path in found:
        if path.suffix == ".tmp" or path.with_suffix(".tmp").exists():
            continue  # in the second case its writer lives
        if target.exists():
            _remove(path)
        else:
            path.rename(target)


def clear_folder(folder: Path) -> None:
    """Remove leftovers of killed writers of any file in `folder`."""
    ours = re.compile(r"\.(.+)\.[0-9a-f]+\.(tmp|old)")
    for name in sorted({match[1] for path in folder.iterdir() if (match := ours.fullmatch(path.name))}):
        clear_leftovers(folder / name)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (not on Windows, where directories cannot be synced)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _followed(target: Path) -> Path:
    """Target of the link `target`, or `target` itself, without leftovers of killed writers at both places.

    CheckpointError if it is a mount point.
    """
    clear_leftovers(target)
    _refuse_mount_point(target)
    if not target.is_symlink():  # other paths stay as given, for the messages
        return target
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target)
    return target


def _refuse_mount_point(target: Path) -> None:
    """CheckpointError if another disk is mounted at `target`: nothing beside it can be renamed to it."""
    if os.path.ismount(target.resolve()):
        within = f"; give one within it, such as {target / 'model'}" if target.is_dir() else ""
        raise CheckpointError(target, f"a path that can be replaced{within}", "a mount point")


def _takes_bytes(target: Path) -> bool:
    """True if something stands at `target` that is written into and not replaced; CheckpointError if it is no file."""
    try:
        mode = target.stat().st_mode
    except OSError:
        return False  # nothing there, or an error that creating the file will name
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or _own_output(target) is not None:
        return True
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISBLK, "a block device"), (stat.S_ISSOCK, "a socket"))
        found = next((name for is_kind, name in kinds if is_kind(mode)), "something else")
        raise CheckpointError(target, "the name of a new file, or of a file to replace", found)
    return False


def _own_output(target: Path) -> int | None:
    """Descriptor of this process's output or error output if `target` names it, as /dev/stdout does."""
    found = target.stat()
    for descriptor in (1, 2):
        try:
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
        except OSError:
            continue  # closed
    return None


def _copy_into(source: Path, target: Path) -> None:
    """Write the bytes of a file to what stands at `target`."""
    own = _own_output(target)
    if own is not None:  # opening it anew would overwrite, in a file, what the process has printed
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    with open(os.open(target, os.O_WRONLY) if own is None else os.dup(own), "wb") as into, source.open("rb") as file:
        shutil.copyfileobj(file, into)


@contextmanager
def _temporary(target: Path, make: Callable[[Path], object]) -> Generator[Path]:
    """A temporary path beside `target`, made and locked; removed on any error."""
    temporary, descriptor = _claim(target, make)
    try:
        yield temporary
    except BaseException:
        _remove(temporary)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _claim(target: Path, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    while True:
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        with space_in_words(target):
            make(temporary)
        if os.name != "posix":
            return temporary, None
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue  # removed by another writer before it was locked
        _lock(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file or folder unless its writer still lives."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # gone meanwhile, or another user's
    try:
        if _lock(descriptor, wait=False):
            _remove(path)
    finally:
        os.close(descriptor)


def _open_to_lock(folder: Path) -> int | None:
    return os.open(folder, os.O_RDONLY) if os.name == "posix" else None


def _is_locked(descriptor: int) -> bool:
    """True if another process holds the lock of an open file; else this one does from now on, where there are locks."""
    import fcntl  # POSIX only

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _lock(descriptor: int, wait: bool) -> bool:
    """True if this process now holds the lock of an open file; False on file systems without locks."""
    import fcntl  # POSIX only

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def space_in_words(target: Path, num_bytes: int | None = None) -> Generator[None]:
    """Turn an error for lack of space into a DiskFullError that names the target and the size."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save replaces an error of the file that it writes to by its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        short = cause.errno is None and "requested and" in str(cause)  # NumPy's error, which has no errno
        if not short and cause.errno not in (*_FULL, errno.EFBIG):
            raise
        takes = "" if num_bytes is None else f"it takes {_size(num_bytes)}, and "
        free = f"{takes}{_size(shutil.disk_usage(target.parent).free)} are free in {target.parent}"
        limit = "it is larger than a file may be here (file system, or ulimit -f)"
        full = f"no space left on the disk ({free})"
        why = f"{full}, or {limit}" if short else f"{limit}; {free}" if cause.errno == errno.EFBIG else full
        before = "; what stood there before is unchanged" if target.exists() else ""
        raise DiskFullError(cause.errno or errno.ENOSPC, f"{target} cannot be written: {why}{before}") from error


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
