"""Options of a cluster that are wrong, and a cluster without Ray."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest

from dsv4.cli import build_parser, main
from dsv4.commands.options import pick_flags
from dsv4.engine.cluster.library import ClusterError, ray_module
from dsv4.server.config import ServerConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 2}, "replicas is 2; allowed: 1, or more together with --cluster"),
        ({"cluster": "local", "replicas": 0}, "replicas is 0; allowed: 1 or more"),
        ({"cluster": "ray://head:10001"}, "cluster is 'ray://head:10001'; allowed: local, auto, or HOST:PORT"),
        ({"cluster": "path/to/model"}, "cluster is 'path/to/model'; allowed: local, auto, or HOST:PORT"),
        ({"cluster": "local", "engine_process": False}, "cluster is 'local' and engine_process False; allowed is one"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**options)


@pytest.mark.parametrize(
    ("flags", "cluster"),
    [
        ("", None),
        ("--cluster", "local"),
        ("--cluster auto", "auto"),
        ("--cluster 10.0.0.1:6379 --port 9", "10.0.0.1:6379"),
    ],
)
def test_the_flag_takes_an_address_or_none(flags: str, cluster: str | None) -> None:
    parsed: argparse.Namespace = build_parser().parse_args(["serve", "model", *flags.split()])
    assert ServerConfig(**pick_flags(parsed, ServerConfig)).cluster == cluster


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def importing(name: str) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", importing)


@pytest.mark.usefixtures("without_ray")
def test_without_ray_the_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ClusterError, match=r"in the repository, \.venv/bin/pip install '\.\[cluster\]'"):
        ray_module("ray.serve")
    assert main(["serve", "--cluster", "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert (
        "error: a cluster needs Ray, which is not installed: in the repository, .venv/bin/pip install '.[cluster]'"
        in told
    )
