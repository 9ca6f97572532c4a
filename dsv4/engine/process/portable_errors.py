"""Exceptions that cross from one process to another with their type, text and attributes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PortableError:
    """A pickled exception; `pickled` is None for one that cannot be: then its text remains."""

    type_name: str
    text: str
    pickled: bytes | None
    rebuilt: tuple[type[BaseException], tuple[Any, ...], dict[str, Any]] | None = None

    @classmethod
    def of(cls, error: BaseException) -> PortableError:
        name, text = type(error).__name__, str(error)
        try:
            pickled = pickle.dumps(error)
            if str(pickle.loads(pickled)) == text:
                return cls(name, text, pickled)
        except Exception:  # the class's __init__ takes other arguments than its `args`, or an attribute stays here
            pass
        parts = (type(error), error.args, vars(error))
        try:
            pickle.loads(pickle.dumps(parts))
        except Exception:
            return cls(name, text, None)
        return cls(name, text, None, parts)

    def error(self) -> BaseException:
        """The exception; a RuntimeError with its type and text where it could not be sent."""
        if self.pickled is not None:
            return pickle.loads(self.pickled)
        if self.rebuilt is not None:
            kind, args, attributes = self.rebuilt
            error = kind.__new__(kind, *args)
            error.args = args
            vars(error).update(attributes)
            return error
        return RuntimeError(f"{self.type_name}: {self.text}")
