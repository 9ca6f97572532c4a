"""Runs of the recipes of post-training: the run's folder, the policy that is trained, its export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from dsv4.checkpoint import load_model
from dsv4.checkpoint.atomic import DiskFullError, kept_if_whole, new_file, sole_writer
from dsv4.config import ModelConfig
from dsv4.engine.loading import check_device
from dsv4.model.transformer import Transformer
from dsv4.model_folder import resolve_model
from dsv4.post_training.data_problems import digests
from dsv4.post_training.efforts import check_ladder
from dsv4.post_training.policy_run import PolicyRun
from dsv4.post_training.recipes import PolicyRecipe
from dsv4.post_training.rollout_service.tables import ServiceError
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.updates import TrainServeError, UpdateError
from dsv4.training.export import check_output, copy_tokenizer, export_model
from dsv4.training.recipe import read_recipe, split_words, write_recipe
from dsv4.training.state import StateError
from dsv4.training.stopping import RunStoppedError

R = TypeVar("R", bound=PolicyRecipe)
RECIPE, MODEL, DATA = "recipe.toml", "model.txt", "data.txt"
Start = Callable[[R, ServedPolicy, argparse.Namespace, Console], PolicyRun]


def run_recipe(name: str, schema: type[R], options: argparse.Namespace, start: Start[R]) -> int:
    """Run a recipe from its command line; 0 when the model folder is written, 143 after a SIGTERM, 130 after Ctrl-C."""
    console = Console()
    run_dir: Path = options.run_dir
    out: Path = options.out or run_dir / "model"
    try:
        recipe = _recipe(schema, options)
        if options.print_config:
            print(write_recipe(recipe), end="")
            return 0
        check_device(recipe.run.device, "run.device")
        check_output(out, run_dir)
        with sole_writer(run_dir):
            _train(recipe, options, start, out, console)
    except RunStoppedError as stopped:
        print(f"{stopped}; to go on: dsv4 train {name} --resume --run-dir {run_dir}", file=sys.stderr)
        return stopped.status
    except (
        *(ValueError, OSError, DiskFullError, MemoryError),
        *(UpdateError, TrainServeError, StateError, ServiceError),
    ) as error:
        raise SystemExit(f"training stopped: {error}") from error
    console.print(f"model folder: {out}", highlight=False)
    return 0


def _train(recipe: R, options: argparse.Namespace, start: Start[R], out: Path, console: Console) -> None:
    run_dir: Path = options.run_dir
    folder = options.model = _begun(run_dir, options) if options.resume else resolve_model(options.model)
    recipe = recipe.for_model(folder)
    recipe.source()  # names what is wrong before anything is written
    data = _data_notes(recipe, run_dir, options.resume)
    if not options.resume and (run_dir / RECIPE).exists():
        raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    check_ladder(folder, [mode.effort for mode in recipe.modes()])
    policy = make_policy(recipe, folder)
    with nullcontext() if options.resume else kept_if_whole(run_dir):
        run = start(recipe, policy, options, console)
        if not options.resume:
            notes = getattr(options, "notes", {}) | data
            _note_run(run_dir, recipe, folder, notes)  # now that nothing given was wrong
    run.run()
    export_model(policy.model, tokenizer_files(folder, run_dir), out)


def make_policy(recipe: PolicyRecipe, folder: Path) -> ServedPolicy:
    """The model to train, and the engine that serves it. ValueError for a context that the model does not take."""
    run, sampling = recipe.run, recipe.sampling
    longest = ModelConfig.from_pretrained(folder).max_position_embeddings
    if not 2 <= sampling.max_model_len <= longest:
        raise ValueError(
            f"sampling.max_model_len is {sampling.max_model_len}; allowed: 2 to {longest}, the most positions of "
            f"{folder}"
        )
    model = load_model(folder, device=run.device, numerics=run.numerics, weights="widened").requires_grad_()
    model.mtp.requires_grad_(False)  # no loss reaches it: its momenta would be zeros, kept and saved
    if not run.train_router:
        freeze_router(model)
    return ServedPolicy(
        model, folder, run.quantized, max_num_seqs=sampling.max_num_seqs, max_model_len=sampling.max_model_len,
        device=run.device,
    )  # fmt: skip


def freeze_router(model: Transformer) -> None:
    """Router weights take no gradient: experts then stay those that pre-training has balanced."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.requires_grad_(False)


def tokenizer_files(folder: Path, run_dir: Path) -> Path:
    """Folder in a run's with copies of the tokenizer's files of the model in `folder`."""
    found = run_dir / "tokenizer"
    copy_tokenizer(folder, found)
    return found


def _recipe(schema: type[R], options: argparse.Namespace) -> R:
    words: Sequence[str] = options.recipe
    first: str | None = options.model
    if first is not None and ("=" in first or first.endswith(".toml")) and not Path(first).is_dir():
        words, options.model = [first, *words], None  # the model was left out
    if options.resume:
        if words:
            raise ValueError(f"--resume goes on with the run's own recipe; without {' '.join(words)}")
        path = options.run_dir / RECIPE
        if not path.is_file():
            raise ValueError(f"--resume: {options.run_dir} holds no run (no {RECIPE})")
        return read_recipe(schema, path).resolved()
    if options.model is None and not options.print_config:
        raise ValueError("no model; give the folder of one before all keys")
    files, keys = split_words(words)
    if len(files) > 1:
        raise ValueError(f"recipes {', '.join(files)}; allowed: one, and KEY=VALUE")
    return read_recipe(schema, Path(files[0]) if files else None, keys).resolved()


def _begun(run_dir: Path, options: argparse.Namespace) -> Path:
    """The model that a run began with. ValueError if another is given."""
    began = Path((run_dir / MODEL).read_text(encoding="utf-8").strip())
    if options.model is not None and (given := resolve_model(options.model)).resolve() != began:
        raise ValueError(f"--resume: the run in {run_dir} began with {began}, not with {given}")
    return resolve_model(began)


def _data_notes(recipe: PolicyRecipe, run_dir: Path, resume: bool) -> dict[str, str]:
    """Digests of the user's files, for the run's folder. ValueError if a run that goes on began with other ones."""
    if not recipe.files():
        return {}
    found, path = digests(recipe.files()), run_dir / DATA
    if resume and path.read_text(encoding="utf-8") != found:
        changed = sorted({*found.splitlines()} - {*path.read_text(encoding="utf-8").splitlines()})
        names = ", ".join(line.partition(" ")[2] for line in changed)
        raise ValueError(f"--resume: {names or DATA} changed since the run in {run_dir} began; allowed: the same rows")
    return {DATA: found}


def _note_run(run_dir: Path, recipe: PolicyRecipe, folder: Path, notes: Mapping[str, str]) -> None:
    """Write the run's model, what else it was given, and its recipe, the recipe last: a folder with it holds a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, text in {MODEL: f"{folder.resolve()}\n", **notes, RECIPE: write_recipe(recipe.placed())}.items():
        with new_file(run_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
