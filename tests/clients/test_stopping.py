"""An agent's processes end with its test."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from .agents import Run, stop


def test_a_service_in_a_session_of_its_own_ends_too(tmp_path: Path) -> None:
    script = "setsid sh -c 'echo $$ >service; exec sleep 300' & sleep 300"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path, env=environment, start_new_session=True)
    service = tmp_path / "service"
    deadline = time.monotonic() + 30
    while not (service.exists() and service.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stop(Run(process, tmp_path / "output.txt"))
    pid = int(service.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
