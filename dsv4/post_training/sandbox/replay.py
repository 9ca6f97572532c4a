"""Sandbox session that survives preemption: recorded steps are answered from the log, and then it goes on live.

A command that is not idempotent never runs again once its end is known. Its log record comes before it, and its result
with a snapshot of the file tree after it; a later session restores that snapshot. Idempotent steps after the last
snapshot run again.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from dsv4.post_training.sandbox.interface import GET_LIMIT, Sandbox, SandboxError, SandboxRefusal, Snapshot
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.log import SessionLog, SnapshotFolder, Step
from dsv4.post_training.sandbox.result import Result, Usage, result_from

INTERRUPTED = Result(None, None, "interrupted", (), b"", b"", 0, 0, 0, Usage())


class DivergenceError(SandboxError):
    """A session asks for something other than what its log has at this place."""


class FinishedError(DivergenceError):
    """A session goes on beyond the log of one that was finished, whose snapshots are removed."""


class InterruptedCommand(SandboxError):
    """A command that is not idempotent began, and its end is not in the log: nobody knows what it did."""


class RecordedSandbox(Sandbox):
    """Sandbox with a log. `make` is called once there is something to run.

    `interrupted` says how a command whose end is not known is answered: by an InterruptedCommand error; by a result
    with killed_by "interrupted", from which the session goes on with the file tree from before the command; or by
    running it again from that tree, for commands that cannot have changed anything outside of the sandbox they ran in.
    """

    def __init__(
        self, make: Callable[[], Sandbox], path: Path, *, interrupted: Literal["error", "report", "again"] = "error"
    ) -> None:
        self._make = make
        self._interrupted = interrupted
        self._live: Sandbox | None = None
        self._settled = False  # the live sandbox has the files that the log says
        self._log = SessionLog(path)
        self._folder = SnapshotFolder(path.with_suffix(".snapshots"))
        self._next = 0
        self._base: str | None = None  # digest of the last snapshot that the log needs
        self._named: set[str] = set()  # digests of snapshots that the caller took
        self._since: list[Callable[[Sandbox], object]] = []  # idempotent steps after it

    @property
    def replaying(self) -> bool:
        return self._next < len(self._log)

    @property
    def limits(self) -> Limits:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._made().limits

    @property
    def python(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._made().python

    def _made(self) -> Sandbox:
        if self._live is None:
            self._live = self._make()
        return self._live

    def _sandbox(self) -> Sandbox:
        """The live sandbox, in the state that the log says. FinishedError without the snapshot of that state."""
        live = self._made()
        if not self._settled:
            if self._base is not None:
                if self._base not in self._folder:
                    raise FinishedError(f"{self._log.path} does not go on: snapshot {self._base} is missing")
                live.restore(Snapshot(self._folder.load(self._base)))
            for step in self._since:
                step(live)
            self._since = []
            self._settled = True
        return live

    def told(self) -> list[tuple[str, Result]]:
        """Commands of this session, as they were asked, and their results."""
        steps = (self._log.step(number) for number in range(self._next))
        return [
            (step.began["asked"], _decoded(step.ended["result"]))
            for step in steps
            if step.began["do"] == "exec" and step.ended is not None and "result" in step.ended
        ]

    def _step(self, do: str, asked: str, details: Mapping[str, object], idempotent: bool) -> Step:
        """Next step: of the log, where the same was asked then, or a new one. DivergenceError where it differs.

        SandboxRefusal where it was refused then; SandboxError where it failed otherwise and the session went on.
        """
        text = json.dumps([do, asked, details], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not self.replaying:
            self._sandbox()  # what cannot be started is not begun either
            step = self._log.begin({"do": do, "asked": asked, "hash": digest, "idempotent": idempotent})
            self._next += 1
            return step
        step = self._log.step(self._next)
        if (step.began["hash"], step.began["idempotent"]) != (digest, idempotent):
            same = step.began["asked"] == asked and step.began["do"] == do
            raise DivergenceError(
                f"{self._log.path}, step {step.sequence}: the log has {step.describe()!r}, the session asks for "
                f"{f'{do} {asked}'!r}" + (" with other input or settings" if same else "")
            )
        self._next += 1
        if step.ended is None and self.replaying:
            raise SandboxError(
                f"{self._log.path}, step {step.sequence}: {step.describe()!r} failed before this session"
            )
        if step.ended is not None and "refused" in step.ended:
            raise SandboxRefusal(step.ended["refused"])
        return step

    @contextmanager
    def _refusals(self, step: Step) -> Generator[None]:
        """Context in which a refusal is the step's end."""
        try:
            yield
        except SandboxRefusal as error:
            self._log.end(step, {"refused": str(error)})
            raise

    def exec(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bytes = b"",
        timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
        idempotent: bool = False,
    ) -> Result:
        """As Sandbox.exec. `idempotent`: running the command again does no harm and leaves the same files."""
        command = command if isinstance(command, str) else list(command)
        if command == []:
            raise ValueError("the command is empty")
        details = {"stdin": _digest(stdin), "timeout": timeout, "environment": dict(environment or {})}
        asked = command if isinstance(command, str) else json.dumps(command)
        step = self._step("exec", asked, details, idempotent)

        def run(sandbox: Sandbox) -> Result:
            return sandbox.exec(command, stdin=stdin, timeout=timeout, environment=environment)

        if step.ended is not None:
            if idempotent:
                self._repeat(run)
            else:
                self._rest_on(step.ended["snapshot"])
            return _decoded(step.ended["result"])
        cut_off = step.earlier and not idempotent  # the earlier session ended within the command
        if cut_off and self._interrupted != "again":
            if self._interrupted == "error":
                self._next -= 1
                raise InterruptedCommand(
                    f"{self._log.path}, step {step.sequence}: {step.describe()!r} began in an earlier session and its "
                    "end is not recorded; it is not idempotent, so it is not run again"
                )
            self._log.end(step, {"result": _encoded(INTERRUPTED), "snapshot": self._base})
            return INTERRUPTED
        sandbox = self._sandbox()
        with self._refusals(step):
            result = run(sandbox)
        outcome: dict[str, Any] = {"result": _encoded(result)}
        if not idempotent:
            try:
                snapshot = sandbox.snapshot()
            except SandboxRefusal as error:
                sandbox.close()  # its files are not those that the log tells of
                raise SandboxError(f"the files after {step.describe()!r} cannot be kept: {error}") from error
            outcome["snapshot"] = snapshot.digest
            self._folder.save(snapshot.digest, snapshot.data)
        self._log.end(step, outcome)
        if not idempotent:
            self._rest_on(outcome["snapshot"])
        return result

    def _repeat(self, action: Callable[[Sandbox], object]) -> None:
        """Remember a step that must run again before the session goes live."""
        if not self._settled:
            self._since.append(action)

    def _rest_on(self, digest: str | None) -> None:
        """Take a snapshot as the state to start from; earlier ones that nobody else names are removed once it holds."""
        self._since = []
        if digest == self._base:
            return
        if self._base is not None and self._base not in self._named and not self.replaying:
            self._folder.remove(self._base)
        self._base = digest

    def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        step = self._step("put", path, {"data": _digest(data), "mode": mode}, True)
        self._finish(step, lambda sandbox: sandbox.put(path, data, mode=mode))

    def get(self, path: str, *, limit: int = GET_LIMIT) -> bytes:
        step = self._step("get", path, {"limit": limit}, True)
        if step.ended is None:
            sandbox = self._sandbox()
            with self._refusals(step):
                data = sandbox.get(path, limit=limit)
            self._log.end(step, {"data": base64.b64encode(data).decode()})
        assert step.ended is not None
        return base64.b64decode(step.ended["data"])

    def snapshot(self) -> Snapshot:
        step = self._step("snapshot", "", {}, True)
        if step.ended is None:
            sandbox = self._sandbox()
            with self._refusals(step):
                taken = sandbox.snapshot()
            self._folder.save(taken.digest, taken.data)
            self._log.end(step, {"snapshot": taken.digest})
        assert step.ended is not None
        self._named.add(step.ended["snapshot"])
        self._rest_on(step.ended["snapshot"])
        return Snapshot(self._folder.load(step.ended["snapshot"]))

    def restore(self, snapshot: Snapshot) -> None:
        step = self._step("restore", snapshot.digest, {}, True)
        self._finish(step, lambda sandbox: sandbox.restore(snapshot))

    def _finish(self, step: Step, action: Callable[[Sandbox], None]) -> None:
        """Do an idempotent step that has no answer, or take note of it for later."""
        if step.ended is None:
            sandbox = self._sandbox()
            with self._refusals(step):
                action(sandbox)
            self._log.end(step, {})
        else:
            self._repeat(action)

    def finish(self) -> None:
        """Remove all snapshots: the log still answers the steps that it has, and the session does not go on."""
        self._folder.clear()

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
        self._log.close()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _encoded(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    for name in ("stdout", "stderr"):
        fields[name] = base64.b64encode(fields[name]).decode()
    return fields


def _decoded(fields: dict[str, Any]) -> Result:
    return result_from(fields, base64.b64decode(fields["stdout"]), base64.b64decode(fields["stderr"]))
