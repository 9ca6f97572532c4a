"""Logits computed by llama.cpp, through the tool that `make llama-bench` builds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch


def llama_check(*arguments: str | Path, stdin: str) -> bytes:
    """Output of the tool that `make llama-bench` builds in the folder LLAMA, as in the Makefile."""
    folder = Path(os.environ.get("LLAMA", Path.home() / ".cache/dsv4/llama.cpp"))
    tool = folder / "build" / "bin" / "llama-check"
    if not tool.is_file():
        pytest.skip(f"no {tool}; make llama-bench builds it")
    done = subprocess.run([tool, *arguments], input=stdin.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def logits(file: Path, ids: torch.Tensor, *, command: str = "logits", streams: Path | None = None) -> torch.Tensor:
    files = [file] if streams is None else [file, streams]
    output = llama_check(command, *files, stdin=" ".join(map(str, ids.tolist())))
    return torch.frombuffer(bytearray(output), dtype=torch.float32).reshape(len(ids), -1)
