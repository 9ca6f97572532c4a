"""Watch over the files that a model's weights are views of or were read from: detects changes since opening."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.folder import Checkpoint
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredWeight

# Names of optional attributes of a loaded model: its MappedFiles and LoadedScales.
MAPPED_FILES = "mapped_files"
LOADED_SCALES = "checkpoint_scales"


class _Identity(NamedTuple):
    """Properties of a file that change if another takes its name (the first two) or it is written to (the last two)."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


class MappedRange(NamedTuple):
    """Addresses of a mapped file: [first, last), which begin at `offset` of it."""

    first: int
    last: int
    offset: int
    file: Path


class MappedFiles:
    """State of an opened folder's files, all mapped. While this object lives, the native kernels watch the files.

    If a read beyond a file's end kills the process (SIGBUS), the kernels first write a line to stderr that names the
    file; on Linux only, and not with the reference kernels, which read a file only while it is loaded.

    A mapping stays valid if its file is replaced under the same name or deleted. It changes if the file is written to,
    and if the file is truncated, reading the lost end kills the process (SIGBUS).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        # Resolved: a link can later point to another file, which is not mapped.
        self._identities = {file.resolve(): _identify(file) for file in checkpoint.map_files()}
        self.ranges = _mapped_ranges(set(self._identities))
        _watched.add(self)
        weakref.finalize(self, _tell_kernels)
        _tell_kernels()

    def change(self) -> str | None:
        """Description of the first file changed since it was opened, or None."""
        for file, opened in self._identities.items():
            try:
                now = _identify(file)
            except OSError:
                continue  # the file or its folder was deleted: the mapping stays valid
            if now[:2] != opened[:2]:
                continue
            if now.num_bytes < opened.num_bytes:
                return f"{file} was cut from {opened.num_bytes} to {now.num_bytes} bytes since it was opened"
            if now != opened:
                return f"{file} was written to since it was opened"
        return None

    def check(self) -> None:
        """CheckpointError if a file changed since it was opened."""
        if (change := self.change()) is not None:
            raise CheckpointError(self._folder, "files that do not change while they are read", change)

    def open_again(self) -> dict[Path, int]:
        """Descriptors of the mapped files, to be closed; CheckpointError if another file or none has a name now."""
        opened: dict[Path, int] = {}
        try:
            for file, identity in self._identities.items():
                try:
                    opened[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(file, "the file as it was when opened", str(error)) from error
                status = os.fstat(opened[file])
                if (status.st_dev, status.st_ino) != identity[:2]:
                    raise CheckpointError(file, "the file as it was when opened", "another file")
        except BaseException:
            for descriptor in opened.values():
                os.close(descriptor)
            raise
        return opened

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFiles:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # pickled weights carry their bytes


class LoadedScales:
    """Scales that a model's weights were read with: looked up in the files only if the model is saved."""

    def __init__(self, find: Callable[[str], Tensor | None], files: MappedFiles) -> None:
        """find: weight name -> its scales or None. Its references keep the files open, and so on the disk."""
        self._find, self._files = find, files

    def get(self, name: str) -> Tensor | None:
        """Scales of an official weight; None if it had none or its file was written to since."""
        return None if self._files.change() is not None else self._find(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedScales:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # empty: another process has not opened the files


def mapped_files(model: object) -> MappedFiles | None:
    """Files that the weights of a loaded model are views of; None if no weight is a view (any more)."""
    files: MappedFiles | None = getattr(model, MAPPED_FILES, None)
    if files is None or not isinstance(model, nn.Module):
        return None
    return files if any(isinstance(parameter, StoredWeight) for parameter in model.parameters()) else None


_watched: weakref.WeakSet[MappedFiles] = weakref.WeakSet()


def _tell_kernels() -> None:
    kernels = backends.native_module()
    if kernels is None:
        return
    line = (
        "dsv4: the process ends (SIGBUS): {} is mapped into it and can no longer be read, most often because the file "
        "was cut short or overwritten. Put other weights in its place by renaming.\n"
    )
    ranges = [(first, last, line.format(file)) for files in _watched for first, last, _, file in files.ranges]
    kernels.watch_bus_errors(ranges)


def _mapped_ranges(files: set[Path]) -> list[MappedRange]:
    """Each mapping of these files; empty if the system has no list."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    found: list[MappedRange] = []
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, _, offset, *_, name = line.split(maxsplit=5)
        if name.startswith("/") and (file := Path(name)) in files:
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append(MappedRange(first, last, int(offset, 16), file))
    return found


def _identify(file: Path) -> _Identity:
    status = file.stat()
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
