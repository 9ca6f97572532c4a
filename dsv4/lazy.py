"""Lazy public names of a package: the module behind a name, and torch with it, is imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, names: Mapping[str, tuple[str, str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package; names: public name -> (module, name there), "" for the module."""

    def get(name: str) -> object:
        if name not in names:
            allowed = ", ".join(sorted(names))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {allowed}")
        module, attribute = names[name]
        loaded = import_module(module)
        value: object = getattr(loaded, attribute) if attribute else loaded
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, list_names
