"""`dsv4 train grpo`, `distill` and `sft` killed at random points end with the bits of runs that nobody has disturbed.

An asynchronous run, whose bits depend on time, ends too, and loses no rollout.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
import torch

from dsv4.training.export import export_model
from tests.forked import FORKED, HANG, end_behind_a_write, kill_behind_each_write
from tests.post_training.small_policy import small_policy

pytest.importorskip("reasoning_gym")
from dsv4.config import nano_path
from dsv4.post_training.groups import Asked, Group
from dsv4.post_training.grpo_run import GRPORun
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.tables import REQUESTS, TOKENS
from recipes import distill, grpo, sft

STEPS = 4
SHORT = (
    f"run.steps={STEPS}", "run.save_every=1", "sampling.prompts=2", "sampling.max_tokens=6",
    "sampling.max_model_len=512", "optimizer.rate=0.01", "problems.tasks=['gcd', 'number_sorting']",
)  # fmt: skip
BY_LENGTH = ("objective.group_size=4", "reward.length=1.0", "reward.free=0")  # rewards that differ for random answers
TIMES = {
    *("seconds", "tokens_per_second", "sampling_seconds", "teaching_seconds", "staleness", "staleness_max"),
    *("stale_share", "worker_deaths", "peak_memory_bytes"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that ends its answers after a few tokens."""
    root = tmp_path_factory.mktemp("small")
    model = small_policy()[0].model
    with torch.no_grad():
        model.head.weight[1] *= 80.0  # the end-of-sentence token
    export_model(model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def noted_grpo(words: list[str]) -> int:
    """`dsv4 train grpo` that notes in `used` which rollouts each step learns from."""
    judged, run_dir = GRPORun._judged, Path(words[-1])

    def noted(self: GRPORun, asked: Asked) -> list[Group]:
        last = self.position.problems
        rollouts = [[one.prompt, list(one.token_ids), list(one.drawn_by)] for one in asked.rollouts]
        note = {"process": os.getpid(), "step": self.position.step, "first": last - len(asked.problems), "last": last}
        with (run_dir / "used").open("a") as file:
            file.write(json.dumps(note | {"rollouts": rollouts}) + "\n")
        return judged(self, asked)

    GRPORun._judged = noted  # type: ignore[method-assign]
    return grpo.main(words)


MAINS: dict[str, Callable[[list[str]], int]] = {
    "grpo": grpo.main, "distill": distill.main, "sft": sft.main, "noted grpo": noted_grpo,
}  # fmt: skip


def start(recipe: str, words: list[str], run_dir: Path, noted: Path | None = None) -> BaseProcess:
    """The command in a process: the run's first call, or the one that goes on with it.

    `noted`: it ends behind its first write that is not noted there.
    """
    begun = (run_dir / ("data.json" if recipe == "sft" else "recipe.toml")).exists()
    chosen = ["--resume"] if begun else words
    command = MAINS[recipe], [*chosen, "--run-dir", str(run_dir)]
    target, *arguments = command if noted is None else (end_behind_a_write, *command, noted)
    process = FORKED.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(HANG)
    assert process.exitcode == 0


def kill_at_random(recipe: str, words: list[str], run_dir: Path, kills: int, seconds: float, seed: int) -> set[int]:
    """Kill a run `kills` times, each within `seconds`, and let it end; the steps at which it was killed."""
    rng, at = random.Random(seed), set[int]()
    for _ in range(kills):
        process = start(recipe, words, run_dir)
        process.join(rng.uniform(0.05, 1.0) * seconds)
        process.kill()
        process.join(HANG)
        assert process.exitcode in (0, -signal.SIGKILL)
        at.add(len(lines(run_dir)))
    finish(start(recipe, words, run_dir))
    return at


def kill_at_step(recipe: str, words: list[str], run_dir: Path, step: int, wait: float) -> None:
    """Kill a run `wait` seconds after it has done `step` steps."""
    process = start(recipe, words, run_dir)
    while process.is_alive() and len(lines(run_dir)) < step:
        time.sleep(0.002)
    time.sleep(wait)
    process.kill()
    process.join(HANG)
    assert process.exitcode == -signal.SIGKILL


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in whole]


def model_bytes(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "model").iterdir()}


def check(recipe: str, words: list[str], tmp_path: Path, kills: int) -> None:
    """Compare a killed run with an undisturbed one."""
    started = time.monotonic()
    finish(start(recipe, words, tmp_path / "whole"))
    seconds = time.monotonic() - started
    assert kill_at_random(recipe, words, tmp_path / "killed", kills, 0.7 * seconds, seed=kills)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
    assert any(line.get("grad_norm", 0.0) > 0.0 for line in lines(tmp_path / "whole"))


def test_a_killed_grpo_run_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    check("grpo", [str(folder), *SHORT, *BY_LENGTH], tmp_path, kills=2)


def test_a_killed_distillation_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "--teacher", f"gcd={folder}", "--teacher", f"default={nano_path()}", *SHORT]
    check("distill", words, tmp_path, kills=2)


def fine_tuning(folder: Path, tmp_path: Path, epochs: int) -> list[str]:
    """Words of `dsv4 train sft` on short conversations, of which two to four are a step."""
    talks = tmp_path / "talks.jsonl"
    pairs = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(8)]
    talks.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in pairs))
    words = [str(folder), str(talks), "--max-tokens", "128", "--epochs", str(epochs), "run.save_every=2"]
    return [*words, "stages.0.row_tokens=128", "stages.0.batch_tokens=128"]


@pytest.mark.parametrize(
    "recipe", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "distill"))]
)
def test_a_run_killed_behind_each_of_its_writes_ends_with_the_same_bits(
    recipe: str, folder: Path, tmp_path: Path
) -> None:
    """Of all that a run writes, each file was the last that it wrote before SIGKILL."""
    referred = ("objective.kl=0.01", "objective.reference_every=1")
    words = {
        "sft": fine_tuning(folder, tmp_path, epochs=2), "grpo": [str(folder), *SHORT, *BY_LENGTH, *referred],
        "distill": [str(folder), "--teacher", f"default={nano_path()}", *SHORT],
    }[recipe]  # fmt: skip
    finish(start(recipe, words, tmp_path / "whole"))
    killed, noted = tmp_path / "killed", tmp_path / "noted"
    kills = kill_behind_each_write(lambda: start(recipe, words, killed, noted))
    written = [Path(line).name for line in noted.read_text().splitlines()]
    assert kills == len(written) >= 5 and {"recipe.toml", "metrics.jsonl", "state.pt", "model"} <= {*written}
    assert ("reference-2.safetensors" in written) == (recipe == "grpo")
    assert losses(killed) == losses(tmp_path / "whole") and model_bytes(killed) == model_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_killed_fine_tuning_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    words, rng = fine_tuning(folder, tmp_path, epochs=16), random.Random(1)
    finish(start("sft", words, tmp_path / "whole"))
    steps = len(lines(tmp_path / "whole"))
    assert steps >= 8
    for step in sorted(rng.sample(range(1, steps - 3), 2)):
        kill_at_step("sft", words, tmp_path / "killed", step, 0.0)
    finish(start("sft", words, tmp_path / "killed"))
    for run in ("whole", "killed"):
        assert [line["step"] for line in lines(tmp_path / run)] == list(range(steps))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")


def losses(run_dir: Path) -> list[tuple[float | None, float | None]]:
    return [(line.get("loss"), line.get("grad_norm")) for line in lines(run_dir)]


@pytest.mark.slow
def test_a_killed_asynchronous_run_uses_each_rollout_once_and_loses_none(folder: Path, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", random.Random(1)
    words = [str(folder), *SHORT, *BY_LENGTH, "service.workers=1", "service.max_staleness=1"]
    logged: list[dict[int, list[list[tuple[int, int]]]]] = []
    for step in (1, 2):
        kill_at_step("noted grpo", words, run, step, rng.random() * 0.2)
        logged.append(in_queue(run))
    finish(start("noted grpo", words, run))
    assert [line["step"] for line in lines(run)] == list(range(STEPS))

    notes: list[dict[str, Any]] = [json.loads(line) for line in (run / "used").read_text().splitlines()]
    used: dict[int, list[dict[str, Any]]] = {}  # step -> what it has learned from, in the run that ended
    for note in notes:
        known = used.setdefault(note["step"], [])
        if known and known[0]["process"] != note["process"]:
            known.clear()
        known.append(note)
    asked = [number for step in range(STEPS) for note in used[step] for number in range(note["first"], note["last"])]
    assert asked == list(range(len(asked)))
    drawn: dict[int, list[list[int]]] = {number: [] for number in asked}
    for step in range(STEPS):
        for note in used[step]:
            for place, tokens, versions in note["rollouts"]:
                drawn[note["first"] + place].append(tokens)
                assert all(step - 1 <= version <= step for version, _ in versions)
    assert {len(answers) for answers in drawn.values()} == {4}

    processes = list(dict.fromkeys(note["process"] for note in notes))
    for kept, process in zip(logged, processes[1:], strict=True):
        begun = next(note for note in notes if note["process"] == process)
        known_tokens = 0
        for number, answers in kept.items():
            for answer in answers if number >= begun["first"] else []:
                prefix = [token for token, version in answer if version <= begun["step"]]
                known_tokens += len(prefix)
                assert any(tokens[: len(prefix)] == prefix for tokens in drawn[number])
        assert known_tokens > 0, "nothing was sampled ahead"


def in_queue(run_dir: Path) -> dict[int, list[list[tuple[int, int]]]]:
    """Tokens and versions in the log of a killed run, for each problem."""
    name = (run_dir / "service" / "run").read_text().strip()
    queue = RolloutQueue(f"sqlite:///{run_dir / 'service' / 'queue.db'}", run=name)
    query = sql.select(REQUESTS.c.problem, TOKENS.c.request, TOKENS.c.token_id, TOKENS.c.version)
    found: dict[int, dict[int, list[tuple[int, int]]]] = {}
    with queue._begin(reads=True) as connection:
        rows = connection.execute(
            query.select_from(TOKENS.join(REQUESTS)).order_by(TOKENS.c.request, TOKENS.c.position)
        )
        for row in rows:
            found.setdefault(row.problem, {}).setdefault(row.request, []).append((row.token_id, row.version))
    queue.close()
    return {problem: list(answers.values()) for problem, answers in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("recipe", ["grpo", "distill"])
def test_many_kills(recipe: str, folder: Path, tmp_path: Path) -> None:
    words = {"grpo": [*BY_LENGTH, "service.workers=2"], "distill": ["--teacher", f"default={nano_path()}"]}
    check(recipe, [str(folder), *SHORT, *words[recipe]], tmp_path, kills=6)
