"""Small functions to program: an expression of Python each, in words and as a reference, with inputs for its tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from types import CodeType
from typing import Any

from dsv4.data.stable_hash import stable_hash

WORDS = ("apple", "tree", "river", "stone", "Moon", "green", "hello", "Paris", "lamp", "eleven", "Otto", "banana")
LETTERS = "aeilnorst"
PROBES = 200  # inputs that tell programs apart


@dataclass(frozen=True)
class Program:
    """A function of `arguments` that returns `expression`; `words` say what it returns."""

    arguments: tuple[str, ...]
    expression: str
    words: str

    def inputs(self, rng: Random) -> list[Any]:
        """Arguments of one call."""
        return _inputs(self.arguments, rng)

    def value(self, inputs: list[Any]) -> Any:
        """Result of the function. The expression is one of this module's."""
        return eval(self._code, {}, dict(zip(self.arguments, inputs, strict=True)))

    @property
    def behavior(self) -> int:
        """Hash of what it returns for PROBES inputs: that of every program that does the same, however written."""
        return stable_hash("behavior", *self.arguments, repr(list(map(self.value, _probes(self.arguments)))))

    @cached_property
    def _code(self) -> CodeType:
        return compile(self.expression, "<program>", "eval")


def draw_program(rng: Random) -> Program:
    """One of numbers, of a list, or of a text."""
    return rng.choice((of_numbers, _of_list, _of_text))(rng)


def of_numbers(rng: Random) -> Program:
    """An expression of one or two numbers."""
    k, m = rng.randint(2, 12), rng.randint(1, 20)
    one = {
        f"a * {k} + {m}": f"{k} times a, plus {m}",
        f"a * {k} - {m}": f"{k} times a, minus {m}",
        f"(a + {m}) * {k}": f"the sum of a and {m}, times {k}",
        f"a // {k}": f"a divided by {k}, rounded down",
        f"a % {k}": f"the remainder of a divided by {k}",
        f"a % {k} == 0": f"True if a can be divided by {k}, else False",
        f"a > {m}": f"True if a is greater than {m}, else False",
        f"a ** 2 + {m}": f"the square of a, plus {m}",
        f"abs(a - {m})": f"the distance between a and {m}",
        f"max(a, {m})": f"the greater of a and {m}",
        f"min(a, {m})": f"the smaller of a and {m}",
    }
    two = {
        f"a + b + {m}": f"the sum of a, b and {m}",
        f"a * b + {m}": f"the product of a and b, plus {m}",
        f"a + b * {k}": f"a plus {k} times b",
        f"a * {k} - b": f"{k} times a, minus b",
        f"abs(a - b) * {k}": f"the distance between a and b, times {k}",
        f"max(a, b) + {m}": f"the greater of a and b, plus {m}",
        f"min(a, b) - {m}": f"the smaller of a and b, minus {m}",
        f"(a + b) % {k}": f"the remainder of a plus b divided by {k}",
        f"(a + b) % {k} == 0": f"True if a plus b can be divided by {k}, else False",
    }
    table, names = rng.choice(((one, ("a",)), (two, ("a", "b"))))
    expression = rng.choice(sorted(table))
    return Program(names, expression, table[expression])


def _of_list(rng: Random) -> Program:
    """A selection of the items, a change of each, and what is made of them."""
    k, m, n = rng.randint(3, 9), rng.randint(1, 12), rng.randint(1, 4)  # k is not 2: those are the even items
    chosen, which = rng.choice(
        (("", ""), (" if x % 2 == 0", "even "), (" if x % 2 == 1", "odd "), (f" if x > {m}", f"greater than {m}"),
         (f" if x < {m}", f"less than {m}"), (f" if x % {k} == 0", f"divided by {k} without remainder"))
    )  # fmt: skip
    change, how = rng.choice(
        (("x", ""), (f"x * {k}", f" times {k}"), (f"x + {m}", f" plus {m}"), ("x * x", " squared"), ("-x", " negated"))
    )
    items = f"the {which}items" if which.endswith(" ") or not which else f"the items that are {which}"
    if which.startswith("divided"):
        items = f"the items that can be divided by {k}"
    listed = "xs" if not chosen and change == "x" else f"[{change} for x in xs{chosen}]"
    said = f"{items}, each{how}" if how else items
    expression, words = rng.choice(
        (
            (f"sum({listed})", f"the sum of {said}"),
            (f"len({listed})", f"the number of {items}"),
            (f"sorted({listed})", f"a sorted list of {said}"),
            (f"sorted({listed}, reverse=True)", f"a list of {said}, sorted from the greatest to the smallest"),
            (f"list(reversed({listed}))", f"a list of {said}, in reverse order"),
            (f"{listed}[:{n}]", f"a list of the first {n} of {said}"),
            (f"{listed}[-{n}:]", f"a list of the last {n} of {said}"),
            (f"max({listed}, default=0)", f"the greatest of {said}, or 0 if there is none"),
            (f"min({listed}, default=0)", f"the smallest of {said}, or 0 if there is none"),
            (listed, f"a list of {said}"),
        )
    )
    return Program(("xs",), expression, words)


def _of_text(rng: Random) -> Program:
    """One or two steps, from the text to the result."""
    k, letter, other = rng.randint(2, 4), rng.choice(LETTERS), rng.choice("xyz-_")
    steps = (
        ("{}.upper()", "in upper case"),
        ("{}.lower()", "in lower case"),
        ("{}[::-1]", "reversed"),
        (f"{{}}[:{k}]", f"cut to its first {k} characters"),
        (f"{{}}[-{k}:]", f"cut to its last {k} characters"),
        (f"{{}} * {k}", f"repeated {k} times"),
        (f"{{}} + '{other}'", f"with '{other}' added at its end"),
        (f"{{}}.replace('{letter}', '{other}')", f"with each '{letter}' replaced by '{other}'"),
        (f"{{}}.replace('{letter}', '')", f"with each '{letter}' removed"),
        ("' '.join({}.split()[::-1])", "with its words in reverse order"),
    )
    ends = (
        ("len({})", "the length of {}"),
        (f"{{}}.count('{letter}')", f"the number of '{letter}' in {{}}"),
        ("len({}.split())", "the number of words in {}"),
        ("{}.split()", "a list of the words of {}"),
        (f"{{}}.startswith('{letter}')", f"True if '{letter}' is the first character of {{}}, else False"),
    )
    expression, words = "s", "s"
    taken = rng.sample(steps, rng.randint(0, 2))
    for step, said in taken:
        expression, words = step.format(_closed(expression)), f"{words} {said}" if words == "s" else f"{words}, {said}"
    if not taken or rng.random() < 0.4:
        end, said = rng.choice(ends)
        expression, words = end.format(_closed(expression)), said.format(words)
    return Program(("s",), expression, words)


def _inputs(arguments: tuple[str, ...], rng: Random) -> list[Any]:
    """A list, a text, or a number per argument, as the arguments' names say."""
    match arguments:
        case ("xs",):
            return [[rng.randint(0, 20) for _ in range(rng.randint(0, 8))]]
        case ("s",):
            return [" ".join(rng.choices(WORDS, k=rng.randint(1, 4)))]
        case _:
            return [rng.randint(0, 40) for _ in arguments]


@cache
def _probes(arguments: tuple[str, ...]) -> list[list[Any]]:
    """PROBES inputs, the same in every process."""
    rng = Random("probes")
    return [_inputs(arguments, rng) for _ in range(PROBES)]


def _closed(expression: str) -> str:
    """An expression that a method can be called on."""
    return f"({expression})" if " + " in expression or " * " in expression else expression
