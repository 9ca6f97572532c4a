"""Ranks that vanish or are asked to stop: the others end and say why; the run goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4.model_folder import nano_path

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Command line of a run with a tiny model on a little text."""
    model, texts = tmp_path / "tiny", tmp_path / "texts"
    config = replace(
        dsv4.ModelConfig.preset("nano"), hidden_size=32, num_hidden_layers=3, num_hash_layers=1, num_attention_heads=2,
        head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8, n_routed_experts=4,
        moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
    )  # fmt: skip
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((nano_path() / name).read_bytes())
    texts.mkdir()
    for n in range(12):
        (texts / f"{n}.txt").write_text(f"Text number {n}.\n\n" + "Some words, and others; the end.\n" * (n + 1))
    sizes = "stages.0.row_tokens=128 stages.0.sequence=64 data.group_rows=4 run.save_every=2 stages.0.steps=2000"
    return [f"model.base={model}", f"data.text={texts}", "parallel.data=2", *sizes.split()]


def start(run_dir: Path, arguments: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    """A run on ranks of torchrun, or with one in a process of its own."""
    command = [sys.executable, "-m", "dsv4"]
    if ranks > 1:
        several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "dsv4"]
        command = [sys.executable, "-m", *several]
    return subprocess.Popen(
        [*command, "train", "pretrain", *arguments, "--run-dir", str(run_dir)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_step(run_dir: Path, step: int) -> None:
    for _ in range(3000):
        if (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text().count("\n") > step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def last_step(run_dir: Path) -> int:
    """The last step in the log."""
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def steps(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def workers(launcher: int) -> list[int]:
    """Ids of the launcher's worker processes."""
    return sorted(map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()))


def wait_for_saving(run_dir: Path) -> None:
    for _ in range(20000):
        if any((run_dir / "checkpoints").glob("writing-*")):
            return
        time.sleep(0.005)
    raise AssertionError("no checkpoint was begun")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")


@needs_proc
def test_a_killed_rank_ends_the_others_with_the_last_checkpoint_whole(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    running = start(run_dir, words)
    wait_for_step(run_dir, 5)
    os.kill(workers(running.pid)[-1], signal.SIGKILL)
    _, said = running.communicate(timeout=200)
    assert running.returncode != 0
    assert "training stopped on rank 0: another rank ended" in said and "--resume" in said, said[-3000:]
    saved = steps(run_dir)[-1]
    assert saved >= 2

    going_on = start(run_dir, ["--resume"])
    wait_for_step(run_dir, saved + 8)
    going_on.terminate()
    going_on.communicate(timeout=200)
    assert steps(run_dir)[-1] > saved


def finish(run_dir: Path, arguments: list[str], ranks: int = 2) -> None:
    running = start(run_dir, arguments, ranks)
    _, said = running.communicate(timeout=500)
    assert running.returncode == 0, said[-3000:]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@needs_proc
@pytest.mark.parametrize(("seed", "others"), [(1, 1), (2, 4)])
def test_a_run_killed_at_any_time_has_the_losses_of_a_whole_one(
    seed: int, others: int, words: list[str], tmp_path: Path
) -> None:
    """A random rank, twice, at a random time; it ends on as many ranks, to the bit, and on others, but for rounding."""
    length, draw = 16, random.Random(seed)
    words = [*words, f"stages.0.steps={length}", "stages.0.row_tokens=1024", "stages.0.batch_tokens=4096"]
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    finish(whole, words)
    arguments = words
    for least in (3, 8):
        running = start(killed, arguments)
        wait_for_step(killed, least)
        done = records(killed)[-1]
        time.sleep(draw.uniform(0.0, 2.0 * done["seconds"] / (done["step"] + 1)))
        os.kill(draw.choice(workers(running.pid)), signal.SIGKILL)
        running.communicate(timeout=200)
        assert running.returncode != 0 and last_step(killed) < length - 1, "it was killed after its end"
        arguments = ["--resume"]
    shutil.copytree(killed, moved)
    finish(killed, ["--resume"])
    want = [(line["step"], line["loss"]) for line in records(whole)]
    assert [(line["step"], line["loss"]) for line in records(killed)] == want and len(want) == length
    finish(moved, ["--resume", f"parallel.data={others}"], others)
    found = [(line["step"], line["loss"]) for line in records(moved)]
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in want]


def test_sigterm_saves_the_step_in_progress(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    running = start(run_dir, [*words, "run.save_every=1000"])
    wait_for_step(run_dir, 3)
    running.terminate()
    _, said = running.communicate(timeout=200)
    assert "stopped by SIGTERM after step" in said and "--resume" in said, said[-3000:]
    assert steps(run_dir) == [last_step(run_dir) + 1]


def test_a_second_ctrl_c_while_saving_leaves_the_checkpoint_whole(words: list[str], tmp_path: Path) -> None:
    """torchrun's ranks are in sessions of their own: it passes the first on, and sends them SIGTERM at the second."""
    run_dir = tmp_path / "run"
    running = start(run_dir, [*words, "run.save_every=1000"])
    wait_for_step(run_dir, 3)
    os.killpg(running.pid, signal.SIGINT)
    wait_for_saving(run_dir)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=200)
    assert "stopped by Ctrl-C after step" in said and "--resume" in said, said[-3000:]
    saved = last_step(run_dir) + 1
    assert steps(run_dir) == [saved]

    going_on = start(run_dir, ["--resume"])
    wait_for_step(run_dir, saved + 1)
    going_on.terminate()
    going_on.communicate(timeout=200)
    assert steps(run_dir)[-1] > saved


@needs_proc
def test_sigterm_to_every_process_saves_the_step_in_progress(words: list[str], tmp_path: Path) -> None:
    """As a scheduler sends it: a rank gets it again from torchrun."""
    run_dir = tmp_path / "run"
    running = start(run_dir, [*words, "run.save_every=1000"])
    wait_for_step(run_dir, 3)
    for rank in workers(running.pid):
        os.kill(rank, signal.SIGTERM)
    wait_for_saving(run_dir)
    running.terminate()
    _, said = running.communicate(timeout=200)
    assert "stopped by SIGTERM after step" in said, said[-3000:]
    assert steps(run_dir) == [last_step(run_dir) + 1]
