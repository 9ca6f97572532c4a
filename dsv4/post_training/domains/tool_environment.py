"""Local tools of an agent: files, a key-value store, a calculator, and where wanted a shell in the sandbox."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from deepseek_recipe import ToolDefinition

from dsv4.post_training.problems import Explained
from dsv4.post_training.sandbox.interface import Sandbox, SandboxError, SandboxRefusal
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.replay import DivergenceError, RecordedSandbox
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.substrates import open_sandbox

MOST_ENTRIES, LONGEST = 64, 4096  # of files and of keys; characters of each
LARGEST = 10**12  # number of the calculator
LIMITS = Limits(
    wall_seconds=5, processor_seconds=5, memory_bytes=128 * MIB, processes=16, disk_bytes=8 * MIB,
    output_bytes=64 << 10,  # of which a turn gets some thousand characters, and all of which a log has
)  # fmt: skip
T = TypeVar("T")


def _tool(name: str, description: str, *parameters: str) -> ToolDefinition:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    return ToolDefinition(name, description, {"type": "object", "properties": properties, "required": [*parameters]})


TOOLS = (
    _tool("list_files", "Names of all files"),
    _tool("read_file", "Text of a file", "name"),
    _tool("write_file", "Write a file", "name", "text"),
    _tool("get", "Value of a key", "key"),
    _tool("set", "Set a key", "key", "value"),
    _tool("calculate", "Value of an expression with + - * / and brackets", "expression"),
)
SHELL = _tool("run", "Run a shell command", "command")


@dataclass(frozen=True)
class Goal:
    """State that an episode should reach: files and keys with their texts, and the last turn's answer if not None."""

    files: dict[str, str] = field(default_factory=dict[str, str])
    keys: dict[str, str] = field(default_factory=dict[str, str])
    answer: str | None = None


class ToolEnvironment:
    """Files and keys in memory; `tools` names what may be called."""

    def __init__(self, goal: Goal, files: dict[str, str], keys: dict[str, str]) -> None:
        self.goal, self.files, self.keys = goal, dict(files), dict(keys)
        self._tools: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
            "list_files": (lambda: "\n".join(sorted(self.files)) or "no files", ()),
            "read_file": (lambda name: self.files.get(name, f"no file {name}"), ("name",)),
            "write_file": (lambda name, text: _put(self.files, name, text), ("name", "text")),
            "get": (lambda key: self.keys.get(key, f"no key {key}"), ("key",)),
            "set": (lambda key, value: _put(self.keys, key, value), ("key", "value")),
            "calculate": (calculate, ("expression",)),
        }

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self._tools:
            return f"no tool {name}"
        function, wanted = self._tools[name]
        if set(arguments) != set(wanted):
            return f"{name} takes {', '.join(wanted) or 'no arguments'}"
        return function(**{key: str(value) for key, value in arguments.items()})

    def outcome(self, answer: str) -> Explained:
        return _outcome(self.goal, self.files.get, self.keys.get, answer)

    def close(self) -> None:
        pass


class ShellEnvironment:
    """A shell in a sandbox of its own, which is opened by the first call.

    With a log, commands that have ended in an earlier process are answered from it, and the file tree is as they left
    it. One that was cut off runs again from the tree before it: all that it can have changed is gone with its sandbox.
    """

    def __init__(self, goal: Goal, files: dict[str, str]) -> None:
        self.goal, self._files = goal, dict(files)
        self._sandbox: Sandbox | None = None
        self._log: Path | None = None

    def log_to(self, path: Path) -> None:
        self._log = path

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name != "run":
            return f"no tool {name}"
        if set(arguments) != {"command"}:
            return "run takes command"
        command = str(arguments["command"]).replace("\0", "")
        return self._do(lambda sandbox: _shown(sandbox.exec(command)))

    def outcome(self, answer: str) -> Explained:
        return _outcome(self.goal, self._read, {}.get, answer)

    def finish(self) -> None:
        if isinstance(self._sandbox, RecordedSandbox):
            self._sandbox.finish()

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def _opened(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = _made() if self._log is None else RecordedSandbox(_made, self._log, interrupted="again")
            for name, text in self._files.items():
                self._sandbox.put(name, text.encode())
        return self._sandbox

    def _do(self, action: Callable[[Sandbox], T]) -> T:
        """Do an action in the sandbox. If the log goes another way here, it is given up."""
        try:
            return action(self._opened())
        except DivergenceError:  # other weights have drawn the rest of the episode, or this machine computes otherwise
            return action(self._begun_again())

    def _begun_again(self) -> Sandbox:
        """A new sandbox with a new log, after the same commands. SandboxError if one has another result there."""
        assert self._log is not None and isinstance(self._sandbox, RecordedSandbox)
        told = self._sandbox.told()
        self.finish()
        self.close()
        self._log.unlink()
        sandbox = self._opened()
        for command, result in told:
            if _shown(sandbox.exec(command)) != _shown(result):
                raise SandboxError(f"the log of {command!r} is lost, and it gives another result when it runs again")
        return sandbox

    def _read(self, name: str) -> str | None:
        if self._sandbox is None:
            return self._files.get(name)
        try:
            found = self._do(lambda sandbox: sandbox.get(name, limit=LONGEST))
        except SandboxRefusal:  # no such file, or what is no file; a sandbox that was lost raises
            return None
        return found.decode(errors="replace").strip()


def _made() -> Sandbox:
    return open_sandbox(limits=LIMITS)


def _shown(result: Result) -> str:
    return "\n".join(part for part in (result.text.strip(), result.describe()) if part)


def _outcome(goal: Goal, file: Callable[[str], str | None], key: Callable[[str], str | None], answer: str) -> Explained:
    wrong = [f"file {name}" for name, text in goal.files.items() if file(name) != text]
    wrong += [f"key {name}" for name, text in goal.keys.items() if key(name) != text]
    if goal.answer is not None and answer.strip() != goal.answer:
        wrong.append("the answer")
    return Explained(float(not wrong), f"not as wanted: {', '.join(wrong)}" if wrong else "the goal is reached")


def _put(table: dict[str, str], name: str, text: str) -> str:
    if len(text) > LONGEST or (name not in table and len(table) >= MOST_ENTRIES):
        return f"refused: at most {MOST_ENTRIES} entries of {LONGEST} characters"
    table[name] = text
    return "ok"


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """Value of an expression with + - * / and brackets, or in words why there is none."""
    try:
        value = _value(ast.parse(expression[:200].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        return f"cannot be calculated: {error}"
    return str(int(value) if value == int(value) else value)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("only numbers, + - * / and brackets are understood")
    if not abs(value) <= LARGEST:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"a number above {LARGEST}")
    return value  # pyright: ignore[reportReturnType]
