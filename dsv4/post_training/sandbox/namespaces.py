"""Sandbox of Linux namespaces: bubblewrap, a seccomp filter, Landlock, and control groups where they are delegated."""

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from dsv4.post_training.sandbox.cgroup import ControlGroup
from dsv4.post_training.sandbox.inside.cell import PATH, program
from dsv4.post_training.sandbox.inside.entrance import arguments, prefix_of
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.supervised import SupervisedSandbox, trial, unused_user
from dsv4.post_training.sandbox.trusted import code_folder, interpreter


def bubblewrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("bwrap is missing (Debian: apt-get install bubblewrap)")
    return found


class NamespaceSandbox(SupervisedSandbox):
    """Needs Linux, bubblewrap, and leave to make user namespaces. Root starts it as a user without an account.

    `readable`: path inside -> folder or file of the machine, which that user may read.
    """

    name = "namespaces"
    _group: ControlGroup | None = None

    def __init__(self, limits: Limits | None = None, *, readable: Mapping[str, str] | None = None) -> None:
        super().__init__(limits, {**(readable or {}), **prefix_of(interpreter())})

    def _held(self, ready: dict[str, Any]) -> dict[str, str]:
        return {
            "memory and processes": "control group" if self._group else "limits per process, samples of the sum",
            "access to files": f"mounts, Landlock version {ready['landlock']}" if ready["landlock"] else "mounts",
        }

    def _start(self) -> "subprocess.Popen[bytes]":
        found = bubblewrap()
        self._group = ControlGroup.make(self.limits)
        python = interpreter()
        command = [found, *arguments(code_folder(), self._readable)[1:], python, *program("supervisor")]
        user = group = groups = None
        if os.getuid() == 0:
            user = unused_user()
            if self._group is None:
                group, groups = user, list[int]()
            else:
                command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
                user = None
        if self._group is not None:
            command = self._group.entering(command)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"PATH": os.environ.get("PATH", PATH)},
            cwd="/",
            bufsize=0,
            user=user,
            group=group,
            extra_groups=groups,
        )

    def _events(self) -> dict[str, int]:
        return self._group.events() if self._group else {}

    def _amend(self, outcome: dict[str, Any], before: dict[str, int]) -> None:
        if self._group:
            self._group.amend(outcome, before)

    def _end(self) -> None:
        super()._end()
        if self._group is not None:
            self._group.remove()
            self._group = None


@functools.cache
def missing() -> str | None:
    """Reason why no sandbox can be made on this machine; None where one was made."""
    return trial(NamespaceSandbox)
