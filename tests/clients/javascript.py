"""Node.js programs on packages of tests/clients/node/package.json, which `make test-clients` installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "node"
INSTALLED = ROOT / "build" / "clients" / "node"
# Anything but loopback is a closed port: a client that needs the network fails.
NO_NETWORK = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
NO_NETWORK |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")


def need(package: str) -> None:
    """Skips the test unless the package is installed."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is missing")
    if not (INSTALLED / "node_modules" / package).exists():
        pytest.skip(f"{package} is not installed: make test-clients")


def run_module(configuration: str, program: str, *arguments: str) -> Any:
    """Value that a program of this folder prints as JSON, run as one module with a configuration before it."""
    source = configuration + (PROGRAMS / program).read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", suffix=".mjs", dir=INSTALLED) as module:
        module.write(source)
        module.flush()
        command = ["node", module.name, *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": str(INSTALLED), **NO_NETWORK}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
