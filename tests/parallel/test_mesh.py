"""Mesh: degrees are checked before any process waits for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.mesh import launched, process_group


def test_degrees_must_make_the_number_of_ranks() -> None:
    Degrees(data=2, expert=2).check(4, 8, 4)
    with pytest.raises(ValueError, match="data 2.* make 4 ranks; allowed: as many as there are, 3"):
        Degrees(data=2, expert=2).check(3, 8, 4)


def test_degrees_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="expert is 3; allowed: divisors of the 8 experts"):
        Degrees(expert=3).check(3, 8, 4)
    with pytest.raises(ValueError, match="pipeline is 5; allowed: up to the 4 layers"):
        Degrees(pipeline=5).check(5, 8, 4)
    with pytest.raises(ValueError, match="context is 0"):
        Degrees(context=0)


def test_without_a_launcher_the_error_names_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launched({})
    with pytest.raises(ValueError, match="RANK.*torchrun"), process_group():
        pass


@pytest.mark.parametrize(("device", "kinds"), [("cpu", {"cpu"}), ("cuda", {"cpu", "cuda"})])
def test_groups_also_reduce_what_is_on_the_host(device: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl alone would refuse the loop's numbers. No GPU is asked for anything here."""
    chosen: list[Any] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group(device) as own:
        assert own == torch.device("cpu" if device == "cpu" else "cuda:3")
    backends = dist.BackendConfig(chosen[0]).get_device_backend_map()
    assert backends["cpu"] == "gloo" and kinds <= backends.keys()
    assert device == "cpu" or backends["cuda"] == "nccl"
