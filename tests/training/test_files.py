"""Files of a run: leftovers of killed writers are removed, full disks and damage are reported, the last state stays."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv4.checkpoint.atomic import DiskFullError, clear_folder, new_file
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.report import Report
from dsv4.training.schedule import Schedule
from dsv4.training.state import StateError, load_state

from .tiny_training import Rows, draw_documents, make_model

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from dsv4.checkpoint.atomic import new_file
with new_file(Path(sys.argv[1])) as path:
    path.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Counting:
    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(step, 30, 5))


def make_trainer(run_dir: Path, steps: int = 6, save_every: int = 2) -> Trainer:
    run_dir.mkdir(exist_ok=True)
    model, optimizer = make_model()
    settings = TrainSettings(Schedule(peak=0.02, warmup_steps=1), save_every=save_every)
    plan = FixedPlan(steps)
    return Trainer(model, optimizer, [Stage("only", 1.0, Counting())], settings, plan, run_dir, quiet=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder after two steps."""
    make_trainer(tmp_path / "run").run(stop_after=2)
    return tmp_path / "run"


def test_the_next_run_clears_leftovers_of_a_killed_one(saved: Path) -> None:
    for _ in range(2):
        process = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(saved / "state.pt")], check=False)
        assert process.returncode == -signal.SIGKILL
    leftovers = [path for path in saved.iterdir() if path.name.endswith(".tmp")]
    assert len(leftovers) == 1 and leftovers[0].stat().st_size == 1000, "the second writer cleared the first one's"
    trainer = make_trainer(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["metrics.jsonl", "state.pt"]
    assert trainer.progress.step == 2


def test_only_leftovers_are_cleared(tmp_path: Path) -> None:
    keep = ["state.pt", ".state.pt.tmp", "state.pt.99.tmp", ".notes.txt", ".a.1x.tmp"]
    for name in [*keep, ".state.pt.0123abcd.tmp", ".x.89abcdef.tmp"]:
        (tmp_path / name).write_text("x")
    with new_file(tmp_path / "plan.json") as living:
        clear_folder(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*keep, living.name}


def limited(size: int) -> Callable[[], None]:
    """A preexec_fn that limits the files of a subprocess to `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_limited(run_dir: Path, size: int) -> str:
    """Continue training in a process whose files are limited to `size` bytes; return its last line on stderr."""
    code = (
        "import sys; from pathlib import Path; from tests.training.test_files import make_trainer;"
        "make_trainer(Path(sys.argv[1])).run()"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        cwd=root, capture_output=True, text=True, check=False, preexec_fn=limited(size),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_full_disk_is_reported_with_file_and_numbers_and_the_last_state_stays(saved: Path) -> None:
    before = (saved / "state.pt").read_bytes()
    line = run_limited(saved, len(before) // 2)
    assert line.startswith(
        f"dsv4.checkpoint.atomic.DiskFullError: {saved / 'state.pt'} cannot be written: it is larger"
    )
    assert "is unchanged" in line and f"are free in {saved}" in line
    needed = 1e6 * float(line.split("it takes ")[1].split(" MB")[0])
    assert 0.7 * len(before) < needed <= len(before)
    assert (saved / "state.pt").read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == ["metrics.jsonl", "state.pt"]
    trainer = make_trainer(saved)
    assert trainer.progress.step == 2
    trainer.run()
    assert [json.loads(x)["step"] for x in (saved / "metrics.jsonl").read_text().splitlines()] == list(range(6))


def test_a_full_disk_under_the_metrics_is_reported_and_the_run_resumes(saved: Path) -> None:
    size = (saved / "metrics.jsonl").stat().st_size
    line = run_limited(saved, size + 10)
    assert "DiskFullError" in line and f"{saved / 'metrics.jsonl'} cannot be written" in line
    make_trainer(saved).run()
    assert [json.loads(x)["step"] for x in (saved / "metrics.jsonl").read_text().splitlines()] == list(range(6))


def test_other_write_errors_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="denied") as caught, new_file(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise PermissionError("denied")
    assert not isinstance(caught.value, DiskFullError) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_state_cut_short_is_refused_in_words(saved: Path, share: float) -> None:
    path = saved / "state.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StateError, match=r"state\.pt is damaged or no state of a run .*; remove it to start"):
        make_trainer(saved)


def test_no_damaged_byte_of_a_state_goes_unnoticed(saved: Path) -> None:
    path = saved / "state.pt"
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(3)
    model, optimizer = make_model()
    want = torch.load(path, weights_only=True)["model"]
    anywhere = torch.randint(0, len(content), (40,), generator=generator).tolist()
    directory = torch.randint(len(content) - 9000, len(content), (40,), generator=generator).tolist()
    for place in [*anywhere, *directory]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x90]) + content[place + 1 :])
        try:
            load_state(path, model, optimizer)
        except StateError:
            continue
        # Padding bytes between the parts of the file do not matter.
        for name, value in model.state_dict().items():
            assert torch.equal(value, want[name]), (place, name)


def change(saved: Path, edit: Callable[[dict], object]) -> None:
    state = torch.load(saved / "state.pt", weights_only=True)
    edit(state)
    torch.save(state, saved / "state.pt")


WQ_A = "layers.1.attn.wq_a.weight"
EDITS: dict[str, tuple[Callable[[dict], object], str]] = {
    "dtype": (
        lambda s: s["model"].update({WQ_A: s["model"][WQ_A].bfloat16()}),
        rf"model\.{WQ_A} is torch.bfloat16 \(16, 32\), but the run's is torch.float32 \(16, 32\)",
    ),
    "shape": (lambda s: s["model"].update({WQ_A: s["model"][WQ_A][:1]}), r"\(1, 32\), but the run's is .* \(16, 32\)"),
    "missing": (lambda s: s["model"].pop(WQ_A), rf"model\.{WQ_A} is missing"),
    "another": (lambda s: s["model"].update(more=torch.ones(1)), r"model\.more and 0 more are not in the model"),
    "momentum": (
        lambda s: s["optimizer"]["muon"].update({WQ_A: torch.ones(1, 1)}),
        r"optimizer\.muon\.layers\.\S+ is torch.float32 \(1, 1\), but",
    ),
    "moments": (
        lambda s: s["optimizer"]["adamw"]["state"][0].update(exp_avg=torch.ones(3)),
        r"AdamW's exp_avg of hc_head_base is torch.float32 \(3,\), its parameter",
    ),
    "no optimizer": (lambda s: s.pop("optimizer"), "holds no model, optimizer, progress and rng"),
    "progress": (lambda s: s["progress"].pop("step"), "progress is .*; expected step, stage"),
    "stage": (lambda s: s["progress"].update(stage=4), "is in stage 4; the run has 1"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_state_of_another_model_is_refused_with_the_tensor(saved: Path, kind: str) -> None:
    edit, words = EDITS[kind]
    change(saved, edit)
    with pytest.raises(StateError, match=words) as caught:
        make_trainer(saved)
    assert str(saved / "state.pt") in str(caught.value)


def test_a_pickle_that_is_no_state_is_refused(saved: Path) -> None:
    torch.save([1, 2], saved / "state.pt")
    with pytest.raises(StateError, match="is no state of a run"):
        make_trainer(saved)


def test_damaged_lines_of_metrics_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\n\xff\xfe}\n[]\n{}\n{"step": 1}\n{"step": 2}\n{"ste')
    with Report(path, 2, quiet=True):
        pass
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def poison(trainer: Trainer, name: str) -> None:
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("head.weight", "next_token nan, mtp nan"),
        ("mtp.0.e_proj.weight", "mtp nan"),
        ("layers.1.attn.indexer.wq_b.weight", "indexer nan"),
    ],
)
def test_a_loss_that_is_not_finite_is_named_and_the_last_state_stays(saved: Path, name: str, words: str) -> None:
    before = (saved / "state.pt").read_bytes()
    trainer = make_trainer(saved)
    poison(trainer, name)
    with pytest.raises(NonFiniteLossError, match=rf"step 2, stage only: {words}.* \(replica 0\); nothing") as caught:
        trainer.run()
    assert f"the last saved state is {saved / 'state.pt'}" in str(caught.value)
    assert (saved / "state.pt").read_bytes() == before


def test_a_gradient_that_is_not_finite_is_named(saved: Path) -> None:
    trainer = make_trainer(saved)
    weight = trainer.model.get_parameter(WQ_A)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match=rf"step 2, .*gradient norm (nan|inf); gradient of {WQ_A};"):
        trainer.run()


def test_parameters_that_are_not_finite_are_not_saved(saved: Path) -> None:
    before = (saved / "state.pt").read_bytes()
    trainer = make_trainer(saved)
    poison(trainer, WQ_A)
    with pytest.raises(NonFiniteLossError, match=rf"after step 1 parameter {WQ_A} is not finite; nothing was saved"):
        trainer.save()
    assert (saved / "state.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"), [("save_every", 0), ("threads", 0), ("quantized_share", 1.5), ("grad_clip", 0.0)]
)
def test_senseless_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
        TrainSettings(Schedule(peak=0.01, warmup_steps=1), **{name: value})


def test_a_state_of_more_gpus_than_are_here_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.load(saved / "state.pt") | {"cuda_rng": [torch.get_rng_state()] * 3}
    torch.save(state, saved / "state.pt")
    restored: list[object] = []

    def restore(states: list[torch.Tensor]) -> None:
        restored.extend((None, None)[number] for number in range(len(states)))  # as torch, by number of the device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restore)
    assert make_trainer(saved).progress.step == 2 and len(restored) == 2
