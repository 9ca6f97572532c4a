"""GRPO over the rollout service with workers as Ray actors: the bits of a run without it, an actor that is killed."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from dsv4.engine.cluster.connection import Cluster
from dsv4.post_training.recipes import GRPORecipe, ServiceSection
from dsv4.post_training.rollout_service.ray_launcher import RayLauncher

from ..post_training.service_run import make_run, make_service, metrics, same, small_folder

pytestmark = pytest.mark.cluster


def actors() -> list[psutil.Process]:
    """Processes of rollout actors that this process, or one of its children, has started."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RolloutActor"):
                found.append(process)
    return found


@pytest.mark.usefixtures("cluster")
def test_actors_give_the_bits_of_a_run_without_them(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsv4.post_training.rollout_service.ray_launcher.Cluster", lambda *_, **__: cluster)
    folder = small_folder(tmp_path)
    local = make_run(tmp_path / "local", folder)
    local.run()
    service = make_service(tmp_path / "actors", folder, RayLauncher("local", 2, 1))
    run = make_run(tmp_path / "actors", folder, service)
    killed: list[int] = []

    def kill() -> None:
        while not killed and run.position.step < 3:
            time.sleep(0.01)
            if service.queue.num_tokens() and (found := actors()):
                killed.append(found[0].pid)
                found[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    run.run()
    thread.join()
    assert killed and same(run, local)
    assert metrics(tmp_path / "actors")[-1]["worker_deaths"] == 1
    assert "it is started again" in capsys.readouterr().out
    deadline = time.monotonic() + 60
    while actors():
        assert time.monotonic() < deadline, "actors end with their run"
        time.sleep(0.1)


@pytest.mark.usefixtures("cluster")
def test_the_recipe_makes_the_launcher(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.post_training.rollout_service.ray_launcher.Cluster", lambda *_, **__: cluster)
    recipe = GRPORecipe(service=ServiceSection(workers=2, launcher="ray", max_staleness=1))
    service = recipe.service.service(recipe, small_folder(tmp_path), tmp_path, Console())
    assert service is not None and isinstance(service._launcher, RayLauncher)
    service._launcher.close()
