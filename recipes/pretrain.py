"""Train a model from scratch on a folder of text, or on shards of it.

    python recipes/pretrain.py --text docs --steps 20 --run-dir runs/text --out runs/text/model
    python recipes/pretrain.py --shards books=3 --shards code=1 --steps 1000 --run-dir runs/mix

--shards takes folders of `dsv4 data tokenize` with their shares of the tokens; --tasks adds conversations made from the
tasks. --resume continues a killed run from its last saved step, to the same bits, on the same data.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from dsv4.checkpoint.atomic import DiskFullError, new_file
from dsv4.config import ModelConfig
from dsv4.data.augment import Rates
from dsv4.data.records import find_sources
from dsv4.data.shard_loader import RowShape
from dsv4.data.shards import Index
from dsv4.data.tokenizing import ShardWriter
from dsv4.model.transformer import Transformer
from dsv4.model_folder import resolve_model
from dsv4.tokenizer import Tokenizer
from dsv4.training.export import export_model
from dsv4.training.hash_routing import count_tokens, install_tables
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan
from dsv4.training.replicas import ReplicaError
from dsv4.training.schedule import Schedule
from dsv4.training.sources import TASKS, MixtureSource, PartPaths
from dsv4.training.stability import SpikeError, StabilitySettings
from dsv4.training.state import StateError

COUNTED_BATCHES = 8  # batches counted for the token frequencies of the hash-routed layers
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Run:
    """All settings that a run's bits depend on; saved in run.json, so that resuming cannot change them."""

    steps: int
    shards: dict[str, float]  # folder -> share of the tokens
    data: dict[str, str]  # folder -> fingerprint of its data
    tasks: float
    row_tokens: int
    document_tokens: int
    group_rows: int
    fill_in_middle: float
    split_merged: float
    peak_lr: float
    seed: int
    replicas: int
    micro_batches: int
    save_every: int
    device: str
    rollback: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    options = _parser().parse_args(arguments)
    console = Console()
    run_dir: Path = options.run_dir
    out: Path = options.out or run_dir / "model"
    try:
        run = resume_run(run_dir) if options.resume else new_run(options, run_dir, console)
        trainer = make_trainer(run, run_dir, options.workers, console)
        trainer.run()
    except (
        ValueError,
        OSError,
        DiskFullError,
        NonFiniteLossError,
        ReplicaError,
        SpikeError,
        StateError,
        MemoryError,
    ) as error:
        raise SystemExit(f"training stopped: {error}") from error
    export_model(trainer.model, run_dir / "tokenizer", out)
    console.print(f"model folder: {out}", highlight=False)
    return 0


def new_run(options: argparse.Namespace, run_dir: Path, console: Console) -> Run:
    """Make a run's folder: tokenizer, model config, shards of --text, run.json. A run is never overwritten."""
    path = run_dir / "run.json"
    if path.exists():
        raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    if not options.shards and options.text is None and not options.tasks:
        raise ValueError("give --text, --shards or --tasks")
    model = resolve_model(options.model)
    (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, run_dir / "tokenizer" / name)
    size = Tokenizer.from_pretrained(run_dir / "tokenizer").vocab_size
    config = replace(ModelConfig.from_pretrained(model), vocab_size=size)
    shards = dict(map(read_share, options.shards))
    if options.text is not None:
        writer = ShardWriter(find_sources(options.text), run_dir / "tokenizer", run_dir / "shards")
        console.print(f"text: {writer.run().counts.tokens:,} tokens", highlight=False)
        shards[str(run_dir / "shards")] = 1.0
    run = Run(
        steps=options.steps, shards=shards, data={folder: Index.read(Path(folder)).fingerprint for folder in shards},
        tasks=options.tasks, row_tokens=options.row_tokens, document_tokens=options.document_tokens,
        group_rows=options.group_rows, fill_in_middle=options.fill_in_middle, split_merged=options.split_merged,
        peak_lr=options.peak_lr, seed=options.seed, replicas=options.replicas, micro_batches=options.micro_batches,
        save_every=options.save_every, device=options.device, rollback=options.rollback,
    )  # fmt: skip
    for target, values in ((run_dir / "config.json", config.to_dict()), (path, asdict(run))):
        with new_file(target) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return run


def resume_run(run_dir: Path) -> Run:
    """Read run.json and check that the data is what it was."""
    path = run_dir / "run.json"
    if not path.exists():
        raise ValueError(f"--resume: {run_dir} holds no run (no run.json)")
    try:
        run = Run(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--resume: {path} is damaged or of another version: {error}") from error
    for folder, fingerprint in run.data.items():
        if Index.read(Path(folder)).fingerprint != fingerprint:
            raise ValueError(f"--resume: {folder} holds other data than the run began with")
    return run


def read_share(text: str) -> tuple[str, float]:
    """("folder", share) of "folder=share"; the share is 1 if it is left out."""
    folder, _, share = text.partition("=")
    try:
        return str(Path(folder).absolute()), float(share or 1)
    except ValueError as error:
        raise ValueError(f"--shards {text}: FOLDER or FOLDER=SHARE with a number is allowed") from error


def make_source(run: Run, run_dir: Path, config: ModelConfig, workers: int) -> MixtureSource:
    """The run's mixture; pieces are cut at the ends of the model's compression windows."""
    # Named by what they hold: the order of the documents does not depend on where they lie.
    parts = [PartPaths(run.data[folder], (Path(folder),), share) for folder, share in run.shards.items()]
    if run.tasks:
        parts.append(PartPaths(TASKS, (), run.tasks, "all"))
    alignment = math.lcm(*(ratio for ratio in config.compress_ratios if ratio))
    shape = RowShape(run.row_tokens, run.document_tokens, run.group_rows, alignment)
    rates = Rates(run.fill_in_middle, run.split_merged)
    return MixtureSource(run_dir / "tokenizer", tuple(parts), run.seed, shape, rates, workers)


def make_trainer(run: Run, run_dir: Path, workers: int, console: Console) -> Trainer:
    """Build model, optimizer and data of `run`, at the step saved in `run_dir`."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    config = ModelConfig.from_pretrained(run_dir)
    source = make_source(run, run_dir, config, workers)
    model = Transformer(config)
    model.init_weights(generator)
    install_tables(model, count_tokens(source, config.vocab_size, COUNTED_BATCHES), generator)
    model.to(run.device)
    settings = TrainSettings(
        Schedule(run.peak_lr, warmup_steps=min(40, run.steps), decay_fraction=0.3, final_ratio=0.1),
        balance_speed=3e-3,
        replicas=run.replicas,
        micro_batches=run.micro_batches,
        save_every=run.save_every,
        stability=StabilitySettings() if run.rollback else None,
    )
    native = run.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    optimizer = MuonAdamW(model, config, compute_dtype=torch.bfloat16 if native else torch.float32)
    return Trainer(model, optimizer, [Stage("pretrain", 1.0, source)], settings, FixedPlan(run.steps), run_dir, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recipes/pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--text", nargs="+", metavar="SOURCE", help="files, folders or globs, tokenized into the run")
    data.add_argument("--shards", action="append", default=[], metavar="FOLDER=SHARE", help="may be given again")
    data.add_argument("--tasks", type=float, default=0.0, metavar="SHARE", help="share of conversations of the tasks")
    data.add_argument("--row-tokens", type=int, default=4096, metavar="N", help="tokens of a batch (%(default)s)")
    data.add_argument(
        "--document-tokens", type=int, default=1024, metavar="N", help="a longer document is cut (%(default)s)"
    )
    data.add_argument("--group-rows", type=int, default=128, metavar="N", help="batches packed together (%(default)s)")
    data.add_argument(
        "--fill-in-middle", type=float, default=0.1, metavar="RATE", help="share of texts (default: V3's, %(default)s)"
    )
    data.add_argument(
        "--split-merged", type=float, default=0.1, metavar="RATE",
        help="share of tokens that join punctuation and a line break (%(default)s)",
    )  # fmt: skip
    data.add_argument("--workers", type=int, default=0, metavar="N", help="processes that prepare batches")
    parser.add_argument("--model", help="model folder with the config and the tokenizer (default: embedded nano)")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--peak-lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="processes that share a step")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="N", help="batches per process and step")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    parser.add_argument(
        "--rollback", action="store_true", help="on a loss spike, back to a save before it, with Anticipatory Routing"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/pretrain"), help="folder of the run's state")
    parser.add_argument("--out", type=Path, help="model folder to write (default: model in --run-dir)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    return parser


if __name__ == "__main__":
    sys.exit(main())
