"""Train the nano model from scratch: tokenizer, data, pre-training, fine-tuning, quantization, model folder.

    python recipes/nano.py --budget cpu            2 hours on 2 cores
    python recipes/nano.py --budget gpu            20 minutes on one data-centre GPU
    python recipes/nano.py --steps 2 --run-dir runs/try --out runs/try/model   a smoke test

--resume continues a killed run from its last saved step, to the same bits. The run's folder keeps the tokenizer, the
state, the step plan and metrics.jsonl; the model folder appears when training is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from dsv4.checkpoint.atomic import DiskFullError, new_file
from dsv4.config import ModelConfig
from dsv4.data.nano_tokenizer import train_nano_tokenizer
from dsv4.model.transformer import Transformer
from dsv4.training.export import export_model
from dsv4.training.hash_routing import count_tokens, install_tables
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import UNPLANNED, FixedPlan
from dsv4.training.replicas import ReplicaError
from dsv4.training.schedule import Schedule
from dsv4.training.sources import NanoSource
from dsv4.training.stability import SpikeError
from dsv4.training.state import StateError
from dsv4.training.stopping import EXIT_STATUS, RunStoppedError

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN_SHARE = 0.12
WARMUP_STEPS = 40
CALIBRATION_STEPS = 12
REPLAN_EVERY = 50  # steps
COUNTED_BATCHES = 24  # batches counted for the token frequencies of the hash-routed layers


@dataclass(frozen=True)
class Run:
    """All settings that a run's bits depend on; saved in run.json, so that resuming cannot change them."""

    budget: str
    seconds: float | None
    steps: int | None
    tokens_per_batch: int
    peak_lr: float
    seed: int
    replicas: int = 1
    preset: str = "nano"
    device: str = "cpu"
    muon_dtype: str = "bfloat16"  # dtype of the Newton-Schulz products
    compute_dtype: str = "float32"  # dtype of the layers' products in forward and backward


class TimePlan:
    """Plan with a budget of `seconds`: total steps from the measured speed.

    The speed is measured after CALIBRATION_STEPS steps and again every REPLAN_EVERY steps until the learning rate
    decays. Every total is written to `path` at once and never recomputed, so that a resumed run repeats its steps to
    the same bits.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"a run of {seconds} seconds; allowed: more than 0")
        self.path, self.seconds = path, seconds
        # (step of the measurement, total steps of the run from then on)
        self.entries: list[tuple[int, int]] = _read_plan(path) if path.exists() else []
        self._mark: tuple[int, float] | None = None

    def total(self, step: int) -> int:
        return next((total for made, total in reversed(self.entries) if made <= step), UNPLANNED)

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        if freeze:
            return
        if self._mark is None:  # the first step allocates and warms up, so it is left out of the speed
            if step >= 1:
                self._mark = (step, elapsed)
            return
        since, at = self._mark
        due = step == CALIBRATION_STEPS or (step > CALIBRATION_STEPS and step % REPLAN_EVERY == 0)
        if not due or step <= since or (self.entries and self.entries[-1][0] >= step):
            return
        # Mean over the whole run: on a busy machine fifty consecutive steps can be off by a factor of two.
        seconds_per_step = (elapsed - at) / (step - since)
        self.entries.append((step, step + max(1, int((self.seconds - elapsed) / seconds_per_step))))
        with new_file(self.path) as temporary:
            temporary.write_text(json.dumps({"steps": None, "seconds": self.seconds, "entries": self.entries}), "utf-8")


def _read_plan(path: Path) -> list[tuple[int, int]]:
    """Entries of a plan file; ValueError with the path if it is damaged."""
    try:
        return [(int(step), int(total)) for step, total in json.loads(path.read_text(encoding="utf-8"))["entries"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or no plan of a run: {error!r}") from error


# The GPU run sees many more tokens: larger batches, the same peak learning rate.
DEFAULTS = {
    "cpu": {"seconds": 6600.0, "tokens_per_batch": 4096, "peak_lr": 3e-3, "device": "cpu", "replicas": 2},
    "gpu": {"seconds": 1080.0, "tokens_per_batch": 32768, "peak_lr": 3e-3, "device": "cuda"},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    options = _parser().parse_args(arguments)
    console = Console()
    run_dir: Path = options.run_dir
    check_target(options.out)
    run = load_or_make_run(options, run_dir)
    tokenizer_folder = make_tokenizer(run_dir, console)
    try:
        trainer = make_trainer(run, tokenizer_folder, run_dir, console)
        trainer.run()
    except RunStoppedError as stopped:
        print(f"{stopped}; to go on: dsv4 train nano --resume --run-dir {run_dir}", file=sys.stderr)
        return EXIT_STATUS
    except (DiskFullError, NonFiniteLossError, ReplicaError, SpikeError, StateError, MemoryError) as error:
        raise SystemExit(f"training stopped: {error}") from error
    export_model(trainer.model, tokenizer_folder, options.out)
    console.print(f"model folder: {options.out}", highlight=False)
    if options.eval:
        from dsv4.evals.model_card import write_model_card
        from dsv4.evals.runner import evaluate

        scores, _ = evaluate(options.out, examples=options.eval, console=console)
        write_model_card(options.out, scores, asdict(run), run_dir)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recipes/nano.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", choices=sorted(DEFAULTS), default="cpu", help="size of the run (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, help="training time instead of the budget's")
    parser.add_argument("--steps", type=int, help="a fixed number of steps instead of a time")
    parser.add_argument("--tokens-per-batch", type=int, help="tokens of one step instead of the budget's")
    parser.add_argument("--replicas", type=int, help="processes that share a step's tokens instead of the budget's")
    parser.add_argument("--peak-lr", type=float, help="highest learning rate instead of the budget's")
    parser.add_argument(
        "--muon-dtype",
        choices=("bfloat16", "float32"),
        help="number format of Muon's products instead of the machine's: bfloat16 where it multiplies them natively",
    )
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="number format of the layers' products in forward and backward (default: float32)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "nano", help="model folder to write")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "nano", help="folder of the run's state")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--eval", type=int, default=0, metavar="N", help="then score N examples per task and mode")
    return parser


def check_target(out: Path) -> None:
    """Refuse `out`, before hours of training, if it is neither new, empty nor a model folder: exporting replaces it."""
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"--out: {out} holds something else than a model; give a new, an empty or a model folder")


def load_or_make_run(options: argparse.Namespace, run_dir: Path) -> Run:
    """Load the run in `run_dir` with --resume, else make a new one; an existing run is never overwritten."""
    path = run_dir / "run.json"
    if options.resume:
        if not path.exists():
            raise SystemExit(f"--resume: {run_dir} holds no run (no run.json)")
        return read_run(path)
    if path.exists():
        raise SystemExit(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    values = DEFAULTS[options.budget] | {"budget": options.budget, "seed": options.seed, "steps": options.steps}
    values["muon_dtype"] = fast_muon_dtype(str(values["device"]))
    for name in ("seconds", "tokens_per_batch", "peak_lr", "replicas", "muon_dtype", "compute_dtype"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    if options.steps is not None:
        values["seconds"] = None
    run = Run(**values)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(run), indent=2) + "\n"
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return run


def read_run(path: Path) -> Run:
    """Read run.json; SystemExit with a message if it is damaged."""
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"--resume: {path} is damaged or of another version: {error}") from error


def fast_muon_dtype(device: str) -> str:
    """bfloat16 if `device` has instructions for it, else float32: torch's emulation has a tenth of fp32's speed."""
    native = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if native else "float32"


def make_tokenizer(run_dir: Path, console: Console) -> Path:
    """Train the tokenizer into `run_dir`/tokenizer unless it is there already; return that folder."""
    folder = run_dir / "tokenizer"
    if not folder.exists():
        console.print("training the tokenizer")
        unfinished = run_dir / "tokenizer.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        train_nano_tokenizer(unfinished)
        unfinished.rename(folder)
    return folder


def make_trainer(run: Run, tokenizer_folder: Path, run_dir: Path, console: Console) -> Trainer:
    """Build model, optimizer and data of `run`, at the step saved in `run_dir`."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    config = ModelConfig.preset(run.preset)
    stages = [
        Stage(name, share, NanoSource(tokenizer_folder, name, run.seed, run.tokens_per_batch // run.replicas))
        for name, share in (("pretrain", PRETRAIN_SHARE), ("sft", 1 - PRETRAIN_SHARE))
    ]
    model = Transformer(config)
    model.init_weights(generator)
    install_tables(model, count_tokens(stages[-1].source, config.vocab_size, COUNTED_BATCHES), generator)
    model.to(run.device)
    if run.steps is not None:
        plan = FixedPlan(run.steps)
    else:
        assert run.seconds is not None, "a run has steps or seconds"
        plan = TimePlan(run_dir / "plan.json", run.seconds)
    settings = TrainSettings(
        Schedule(run.peak_lr, WARMUP_STEPS, decay_fraction=0.35, final_ratio=0.02),
        balance_speed=3e-3,
        quantized_share=0.2,
        replicas=run.replicas,
        autocast=torch.bfloat16 if run.compute_dtype == "bfloat16" else None,
    )
    optimizer = MuonAdamW(model, config, compute_dtype=getattr(torch, run.muon_dtype))
    console.print(f"Muon's products in {run.muon_dtype}", highlight=False)
    return Trainer(model, optimizer, stages, settings, plan, run_dir, console)


if __name__ == "__main__":
    sys.exit(main())
