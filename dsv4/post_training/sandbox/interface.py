"""Interface of every sandbox, and its errors."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.result import Result

GET_LIMIT = 16 << 20


class SandboxError(Exception):
    """A sandbox cannot be made, was lost, or refuses a request of the caller."""


class SandboxRefusal(SandboxError):
    """A sandbox that goes on refuses one request, such as to read a file that is not there."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """File tree of a sandbox (/work and /tmp) as an archive; equal trees have equal digests."""

    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class Sandbox(ABC):
    """Place where commands run apart from the machine. Commands share files; their processes end with them.

    A command is an argument list, or a string for `/bin/sh -c`. Paths of `put` and `get` are relative to /work.
    """

    limits: Limits
    python: str  # interpreter inside the sandbox

    @abstractmethod
    def exec(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bytes = b"",
        timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a command in /work until it exits or a limit ends it. `timeout` in seconds is capped at wall_seconds."""

    @abstractmethod
    def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file, making its folders. SandboxRefusal where the path leaves /work, or at the disk limit."""

    @abstractmethod
    def get(self, path: str, *, limit: int = GET_LIMIT) -> bytes:
        """Contents of a regular file of at most `limit` bytes. SandboxRefusal for a link, a device, a pipe, no file."""

    @abstractmethod
    def snapshot(self) -> Snapshot: ...

    @abstractmethod
    def restore(self, snapshot: Snapshot) -> None:
        """Replace the file tree by a snapshot's, of this sandbox or another."""

    @abstractmethod
    def close(self) -> None:
        """End all processes and give back all that the sandbox holds. Closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
