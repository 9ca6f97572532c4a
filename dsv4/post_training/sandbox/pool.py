"""Sandboxes made ahead, for calls that share nothing."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from dsv4.post_training.sandbox.interface import Sandbox, SandboxError
from dsv4.post_training.sandbox.result import Result


class Pool:
    """`size` sandboxes stand ready; each is used once. Safe to use from several threads."""

    def __init__(self, make: Callable[[], Sandbox], size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; a pool has at least 1 sandbox ready")
        self._make = make
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="sandbox-pool")
        self._ready: deque[Future[Sandbox]] = deque(self._threads.submit(make) for _ in range(size))
        self._closed = False

    def take(self) -> Sandbox:
        """Sandbox that nobody has used; the caller closes it. SandboxError where none can be made."""
        with self._lock:
            if self._closed:
                raise SandboxError("the pool of sandboxes is closed")
            first = self._ready.popleft()
            self._ready.append(self._threads.submit(self._make))
        try:
            return first.result()
        except CancelledError:
            raise SandboxError("the pool of sandboxes is closed") from None
        except BaseException:  # such as an interrupt: nobody else would close what is made
            first.add_done_callback(_close)
            raise

    def run(
        self,
        command: Sequence[str] | str,
        *,
        files: Mapping[str, bytes] | None = None,
        stdin: bytes = b"",
        timeout: float | None = None,
    ) -> Result:
        """Run one command, with files beside it, in a sandbox of its own."""
        with self.take() as sandbox:
            for path, data in (files or {}).items():
                sandbox.put(path, data)
            return sandbox.exec(command, stdin=stdin, timeout=timeout)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        for future in self._ready:
            _close(future)
        self._ready.clear()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(made: Future[Sandbox]) -> None:
    """Close the sandbox that a thread has made, if it made one."""
    if not made.cancelled() and made.exception() is None:
        made.result().close()
