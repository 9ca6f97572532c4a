"""Run pytest with dsv4._native from a file, built with sanitizers: python tests/kernels/sanitized.py FILE ARGS...

`make sanitize` builds it and preloads the sanitizers' runtime.
"""

import importlib.util
import sys

import pytest


class NativeOnly:
    """Plugin that deselects tests of plain torch, those with a parameter "reference"."""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        def plain(item: pytest.Item) -> bool:
            call = getattr(item, "callspec", None)
            return call is not None and any(
                value == "reference" for value in call.params.values() if isinstance(value, str)
            )

        dropped = [item for item in items if plain(item)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not plain(item)]


def main(file: str, *arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("dsv4._native", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dsv4._native"] = module
    spec.loader.exec_module(module)
    # A sanitizer writes its report to the file descriptor and ends the process: pytest would have captured the report.
    return pytest.main(["-p", "no:cacheprovider", "--capture=sys", *arguments], plugins=[NativeOnly()])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
