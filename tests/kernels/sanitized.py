"""Run pytest with the dsv4._native at a path, one built with sanitizers: python tests/kernels/sanitized.py FILE ARGS...

`make sanitize` builds it and preloads the sanitizers' runtime.
"""

import importlib.util
import sys

import pytest


def main(file: str, *arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("dsv4._native", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dsv4._native"] = module
    spec.loader.exec_module(module)
    # A report goes to the file descriptor and the process ends: pytest would have kept it to itself.
    return pytest.main(["-p", "no:cacheprovider", "--capture=sys", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
