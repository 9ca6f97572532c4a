"""Programs that a user's rows ask for, with unit tests of their own as the reward."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from deepseek_recipe import Conversation

from dsv4.post_training.problems import Explained
from dsv4.post_training.program_tests import explain_program
from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.sandbox.unit_tests import AssertionTest, CallTest, OutputTest, UnitTest
from dsv4.text import check_text

MOST = 100  # tests of one row
KINDS = ("stdin_stdout", "function_call")
VALUES = {"input", "output"}
OPTIONAL = {"type", "fn_name", "tolerance"}  # null is as good as none, as in all fields but VALUES


@dataclass(frozen=True)
class TestedProblem:
    """A row's prompt, which asks for a program; its tests run in a sandbox.

    `partial`: the reward is the share of tests that pass; else 1 for all, 0 otherwise.
    """

    __test__ = False  # not a class of tests

    domain: str
    key: str  # the row's place
    thinking: bool
    asked: Conversation = field(compare=False)
    tests: tuple[UnitTest, ...] = field(repr=False)
    partial: bool = False
    parallel: ClassVar[bool] = True

    def prompt(self) -> Conversation:
        return self.asked

    def reward(self, answer: str) -> float:
        return self.explain(answer).value

    def explain(self, answer: str) -> Explained:
        """Reward of a program, and why; errors as of `explain_program`."""
        return explain_program(answer, self.tests, self.partial)


def check_sandbox() -> None:
    """ValueError where programs cannot be tested."""
    reason = missing()
    if reason is not None:
        raise ValueError(f"tests of programs run in a sandbox, and there is none here: {reason}")


def read_tests(given: Any) -> tuple[UnitTest, ...]:
    """Unit tests of a row's `tests`: a list, or its JSON in a text, as in a column of Parquet.

    A test is a text of Python statements that run after the program, with its names, and raise where it is wrong; or an
    object with `input` and `output`: texts that it reads and prints; or with `fn_name` too: a list of arguments, and
    the value that the function returns, numbers within `tolerance` of it. `type` (stdin_stdout, function_call) may say
    which of the two it is. ValueError, naming the test, if one is none.
    """
    found = _parsed(given) if isinstance(given, str) else given
    if not isinstance(found, list) or not 1 <= len(found) <= MOST:
        what = f"a list of {len(found)}" if isinstance(found, list) else f"{type(found).__name__}"
        raise ValueError(f"tests is {what}; allowed: a list of 1 to {MOST} tests")
    return tuple(_test(one, f"test {number}") for number, one in enumerate(cast("list[Any]", found), 1))


def _test(given: Any, name: str) -> UnitTest:
    if isinstance(given, str):
        return AssertionTest(name, _statements(given, name))
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {given!r}; allowed: Python statements, or an object with input and output")
    fields = cast("dict[str, Any]", given).items()
    test: dict[str, Any] = {key: value for key, value in fields if value is not None or key in VALUES}
    if not VALUES <= test.keys() <= VALUES | OPTIONAL:
        raise ValueError(f"{name} has {sorted(test)}; allowed: input and output, and fn_name, type, tolerance")
    is_call = "fn_name" in test
    if test.get("type", KINDS[is_call]) != KINDS[is_call]:
        has = "with" if is_call else "without"
        raise ValueError(f"type of {name} is {test['type']!r} {has} fn_name; allowed: {KINDS[is_call]}")
    if is_call:
        return _call(test, name)
    if "tolerance" in test:
        raise ValueError(f"tolerance of {name} is {test['tolerance']!r} without fn_name; allowed: with fn_name")
    for key in ("input", "output"):
        if not isinstance(test[key], str):
            raise ValueError(f"{key} of {name} is {test[key]!r}; allowed: a text, or with fn_name other values")
        check_text(test[key], f"{key} of {name}")
    return OutputTest(name, test["input"], test["output"])


def _call(test: dict[str, Any], name: str) -> CallTest:
    function, tolerance = test.get("fn_name"), test.get("tolerance", 0.0)
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"fn_name of {name} is {function!r}; allowed: the name of a function")
    arguments = test["input"]
    if not isinstance(arguments, list):
        raise ValueError(f"input of {name} is {arguments!r}; allowed with fn_name: a list of arguments")
    for key in ("input", "output"):
        try:
            json.dumps(test[key], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{key} of {name} is no JSON ({error}); allowed: values of JSON") from None
    return CallTest(name, function, cast("list[Any]", arguments), test["output"], _tolerance(tolerance, name))


def _tolerance(given: Any, name: str) -> float:
    try:
        found = -1.0 if isinstance(given, bool) or not isinstance(given, int | float) else float(given)
    except OverflowError:
        found = math.inf
    if not 0.0 <= found < math.inf:
        raise ValueError(f"tolerance of {name} is {given!r:.50}; allowed: a finite number, 0 or more")
    return found


def _statements(code: str, name: str) -> str:
    """Code that can fail where it runs. ValueError if it is no Python, or defines things and does nothing."""
    try:
        compile(code, name, "exec")
        body = ast.parse(code).body
    except (SyntaxError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is no Python: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{name} is Python nested too deep to compile") from None
    if all(_idle(statement) for statement in body):
        raise ValueError(f"{name} tests nothing; allowed: statements that raise, as an assert or a call of a check")
    return code


def _idle(statement: ast.stmt) -> bool:
    """True of an import, a definition, a value under a name, a text or pass, and of what a main program alone runs."""
    if isinstance(statement, ast.If) and not statement.orelse:
        return ast.unparse(statement.test) in ("__name__ == '__main__'", "'__main__' == __name__")
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return statement.value is None or _is_literal(statement.value)
    if isinstance(statement, ast.ClassDef):
        return all(map(_idle, statement.body))
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.Pass)


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError):
        return False
    return True


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tests is a text that is no JSON ({error}); allowed: a list of tests, or its JSON") from None
