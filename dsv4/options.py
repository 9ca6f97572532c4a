"""Options as dataclass fields: each is declared once; its keyword, check and flag follow from the declaration.

`option` declares a field. Functions take the options of a class as keywords (`takes_options`, `check_keywords`,
`pick_keywords`), `check_options` validates the values, `commands/options.py:add_flags` makes the flags.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

# First type of an annotation -> the class of its values, and that class in words.
_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "float": (numbers.Real, "a number"),
    "int": (numbers.Integral, "an integer"),
    "str": (str, "a text"),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One option. `help` and `metavar` belong to its flag."""

    name: str
    default: Any
    type_name: str  # the annotation as written: "int | None"
    help: str
    unit: str = ""  # of the value, in the plural: "tokens"
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("serve",)  # commands with a flag for this option
    flag: str = ""  # default: the name with dashes; a bool with default True needs a name for switching it off
    metavar: str | None = None
    bare: str | None = None  # value of the flag without one; None: it needs one
    group: str | None = None  # title of its flag's group in the help

    @property
    def type_names(self) -> list[str]:
        """Types of the annotation; a flag's text is converted to the first."""
        return self.type_name.split(" | ")

    @property
    def allowed(self) -> str:
        """Allowed values in words."""
        words = ", ".join(self.choices)
        if self.minimum is not None:
            words = f"{self.minimum:g} or more {self.unit}".rstrip()
        return words + "".join(f", or {'' if name == 'None' else 'a '}{name}" for name in self.type_names[1:])

    def check(self, value: Any) -> None:
        """ValueError for a value of the wrong type, below the minimum or outside the choices.

        Of an annotation with several types only None is checked beside the first: the others belong to libraries.
        """
        if value is None and "None" in self.type_names:
            return
        first, *others = self.type_names
        if first in _KINDS and not set(others) - {"None"}:
            kind, noun = _KINDS[first]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{self.name} is {value!r}; it must be {noun}")
        if self.minimum is not None and not cast(float, value) >= self.minimum:
            raise ValueError(f"{self.name} is {value}; allowed: {self.allowed}")
        another_type = len(self.type_names) > 1 and not isinstance(value, str)
        if self.choices and value not in self.choices and not another_type:
            raise ValueError(f"{self.name} is {value!r}; allowed: {self.allowed}")


def parse_size(text: str) -> int:
    """Bytes of a size: "8G" and "8 GiB" are 8 x 1024^3, "500MB" is 500 x 1000^2, "4096" are bytes; else ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"size {text!r}; allowed: a number of bytes, or with a unit, as in 500M, 8G or 1.5T")
    number, unit, binary = found.groups()
    decimal = not binary and text.strip().upper().endswith("B")
    return int(float(number) * (1000 if decimal else 1024) ** " KMGT".index(unit.upper() or " "))


def format_size(size: int) -> str:
    """Bytes in the largest binary unit that divides them, as `parse_size` reads it: "1G", "4000"."""
    unit = max(i for i in range(5) if size % 1024**i == 0) if size else 0
    return f"{size // 1024**unit}{' KMGT'[unit]}".rstrip()


def option(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is an option; `details` are fields of `Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **details})


@functools.cache
def options_of(config: type) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields."""
    return tuple(
        Option(field.name, field.default, str(field.type), **field.metadata) for field in dataclasses.fields(config)
    )


def check_options(config: object) -> None:
    """ValueError for the first value of an instance that its option does not allow. For `__post_init__`.

    A size in words, "4G", becomes its number of bytes.
    """
    for known in options_of(type(config)):
        value = getattr(config, known.name)
        if known.unit == "bytes" and isinstance(value, str):
            try:
                object.__setattr__(config, known.name, parse_size(value))  # the class may be frozen
            except ValueError as error:
                raise ValueError(f"{known.name}: {error}") from error
        known.check(getattr(config, known.name))


def check_keywords(function: str, keywords: Mapping[str, Any], *configs: type) -> None:
    """TypeError for the first keyword that is no option of the classes; the message lists the allowed ones."""
    allowed = [known.name for config in configs for known in options_of(config)]
    for name in keywords:
        if name not in allowed:
            raise TypeError(f"{function}() got an unknown keyword {name!r}; allowed: {', '.join(sorted(allowed))}")


def pick_keywords(config: type[C], keywords: Mapping[str, Any]) -> C:
    """Instance of the class from its own options among the keywords; the rest is ignored."""
    names = {known.name for known in options_of(config)}
    return config(**{name: value for name, value in keywords.items() if name in names})


def takes_options(*configs: type) -> Callable[[F], F]:
    """Shows the options of the classes in a function's signature, in place of its ** parameter."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        own = [known for known in signature.parameters.values() if known.kind is not kinds.VAR_KEYWORD]
        options = [
            kinds(known.name, kinds.KEYWORD_ONLY, default=known.default, annotation=known.type_name)
            for config in configs
            for known in options_of(config)
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *options])
        return function

    return decorate
