"""Train the nano model from scratch: data, base (pre-training), mid (recall), sft (conversations), long (32K tokens).

recipes/nano.toml is the recipe unless another is given; KEY=VALUE changes one of its keys. --corpus is a folder that
`dsv4 train corpus` made.
--base-model leaves out base and mid: the sft goes on from that model; data.corpus='' then trains it on the tasks alone.
--resume continues a killed run from its last saved step, to the same bits; `timeout 3h` or SIGTERM ends a part of a
long run with its state saved. The run's folder keeps data/ (tokenizer, questions, shards), base/, mid/, sft/ and long/,
each with its state, metrics, losses.png and model folder; the last one's is copied to --out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dsv4.checkpoint.atomic import new_file, new_folder, sole_writer
from dsv4.commands.recipe_flags import parse
from dsv4.config import ModelConfig
from dsv4.data.nano.build import NanoData, haystack_part, recall_part
from dsv4.evals.held_out import HeldOut
from dsv4.model_folder import resolve_model
from dsv4.parallel.mesh import launched
from dsv4.training.export import check_output, copy_tokenizer, export_model
from dsv4.training.loop import Stage, Trainer
from dsv4.training.nano_recipe import NanoRecipe, step_flops
from dsv4.training.plan import FixedPlan, TimePlan
from dsv4.training.plots import draw_run
from dsv4.training.pretrain_folder import new_run, resume_run
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.pretrain_run import STOPPED, make_trainer
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.recipe import read_recipe, split_words, write_recipe
from dsv4.training.sources import MixtureSource
from dsv4.training.stopping import RunStoppedError

CURVE_STEPS = 200
RECIPE = Path(__file__).with_name("nano.toml")
# One process, with memory to keep all that the backward reads.
ON_GPU = (
    *("base.run.device=cuda", "base.run.replicas=1", "base.stages.4.recompute=none"),
    *("mid.run.device=cuda", "mid.run.replicas=1", "mid.stages.4.recompute=none"),
    *("sft.run.device=cuda", "sft.run.replicas=1", "sft.stages.1.recompute=none"),
    *("long.run.device=cuda", "long.run.replicas=1", "long.stages.0.recompute=none"),
)
BUDGETS = {"cpu": (), "gpu": ("seconds=1200", *ON_GPU)}  # the GPU run sees many more tokens


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    options = parse("nano", arguments)
    if launched():
        raise SystemExit("nano trains in one process: start it without torchrun, with base.run.replicas=N for several")
    console = Console()
    run_dir: Path = options.run_dir
    out: Path = options.out or run_dir / "model"
    try:
        recipe = saved_recipe(run_dir, options.keys) if options.resume else given_recipe(options)
        if options.print_config:
            print(write_recipe(recipe), end="")
            return 0
        check_output(out, run_dir)
        if recipe.data.corpus:
            data = NanoData(Path(recipe.data.corpus), run_dir / "data", recipe.data.seed, recipe.data.scale)
        elif recipe.sft.model.start is None:
            raise ValueError("the base is trained on a corpus, and there is none; give --corpus")
        else:
            data = None
        parts = recipe.parts[: recipe.parts.index("sft")] if options.base_only else recipe.parts
        with sole_writer(run_dir):
            if not options.resume:
                save_recipe(recipe, run_dir)
            if recipe.sft.model.start is not None:
                take_tokenizer(Path(recipe.sft.model.start), run_dir / "data" / "tokenizer")
            if data is not None:
                data.make(lambda text: console.print(text, highlight=False))
            for part in parts:
                run_part(recipe, part, run_dir, options.workers, console)
            copy_model(run_dir / parts[-1] / "model", out)
    except RunStoppedError as stopped:
        print(f"{stopped}; to go on: dsv4 train nano --resume --run-dir {run_dir}", file=sys.stderr)
        return stopped.status
    except STOPPED as error:
        raise SystemExit(f"training stopped: {error}") from error
    console.print(f"model folder: {out}", highlight=False)
    return 0


def given_recipe(options: argparse.Namespace) -> NanoRecipe:
    """Recipe of the command line."""
    if options.base_only and options.base_model is not None:
        raise ValueError("--base-only and --base-model, which leaves out the base; allowed: one of them")
    keys = [*BUDGETS[options.budget], *options.keys]
    keys += [f"data.corpus={options.corpus.absolute()}"] if options.corpus else []
    keys += [f"seconds={options.seconds}"] if options.seconds else []
    keys += [f"steps={options.steps}"] if options.steps else []
    files, keys = split_words(keys)
    if len(files) > 1:
        raise ValueError(f"recipes {', '.join(files)}; allowed: one, and KEY=VALUE")
    recipe = read_recipe(NanoRecipe, Path(files[0]) if files else RECIPE, keys)
    return recipe if options.base_model is None else recipe.start_from(resolve_model(options.base_model))


def take_tokenizer(model: Path, folder: Path) -> None:
    """The tokenizer of a model in place of one that is made from the corpus."""
    if folder.is_dir():
        return
    with new_folder(folder, overwrite=False) as unfinished:
        copy_tokenizer(model, unfinished)


def save_recipe(recipe: NanoRecipe, run_dir: Path) -> None:
    """Write the run's nano.toml; a run is never overwritten."""
    path = run_dir / "nano.toml"
    if path.exists():
        raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(write_recipe(recipe), encoding="utf-8")


def saved_recipe(run_dir: Path, keys: list[str]) -> NanoRecipe:
    """Recipe of the run in `run_dir`."""
    if keys:
        raise ValueError(f"--resume goes on with the run's own recipe; without {' '.join(keys)}")
    if not (run_dir / "nano.toml").exists():
        raise ValueError(f"--resume: {run_dir} holds no run (no nano.toml)")
    return read_recipe(NanoRecipe, run_dir / "nano.toml")


def run_part(recipe: NanoRecipe, part: str, run_dir: Path, workers: int, console: Console) -> None:
    """Train a part to its end, if it has not ended, and write its model folder and the picture of its losses."""
    folder = run_dir / part
    if (folder / "model").is_dir():
        return
    if (folder / "data.json").exists():
        found = resume_run(folder, [])
    else:
        found = new_run(recipe.part(part, (run_dir / "data").absolute()), folder, console)
    trainer = make_trainer(found, folder, workers, console)
    trainer.stages = choose_losses(trainer.stages, found.data.tasks_loss)
    trainer.plan = make_plan(recipe, part, found, folder)
    if part != recipe.parts[0] and not trainer.state_path.exists():
        before = recipe.parts[recipe.parts.index(part) - 1]
        saved = torch.load(run_dir / before / "state.pt", map_location="cpu", weights_only=True)
        trainer.model.load_state_dict(saved["model"])
    console.print(f"{part}: {' '.join(stage.name for stage in found.stages)}", highlight=False)
    train(trainer, Path(recipe.data.corpus), folder, console)
    draw_run(folder)
    export_model(trainer.model, folder / "tokenizer", folder / "model")  # last: it says that the part has ended


def train(trainer: Trainer | RankTrainer, corpus: Path, folder: Path, console: Console) -> None:
    """Run to the end; every CURVE_STEPS steps, count the bits per byte of held-out packages, outside the run's time."""
    held_out = HeldOut(corpus, folder / "tokenizer", folder / "held_out.jsonl") if has_held_out(corpus) else None

    def measure() -> None:
        if held_out is not None:
            bits = held_out.measure(trainer.model, trainer.progress.step, trainer.progress.tokens)
            console.print(f"held-out packages: {bits:.3f} bits per byte", highlight=False)

    step = trainer.progress.step
    if step and (trainer.finished or step % CURVE_STEPS == 0) and held_out is not None and not held_out.has(step):
        measure()  # the run was killed between its save and this
    while not trainer.finished:
        trainer.run((trainer.progress.step // CURVE_STEPS + 1) * CURVE_STEPS)
        measure()
    if held_out is not None:
        held_out.draw(folder / "held_out.png")


def has_held_out(corpus: Path) -> bool:
    """True if the corpus has held-out packages; one of a few packages may have none."""
    return any((corpus / "validation").glob("*/*.jsonl"))


def make_plan(recipe: NanoRecipe, part: str, found: PretrainRecipe, folder: Path) -> FixedPlan | TimePlan:
    """Plan of a part: its steps, or its share of the budget of time."""
    steps = recipe.part_steps(part)
    if steps is not None:
        return FixedPlan(steps)
    costs = step_flops(found, ModelConfig.from_pretrained(folder))
    return TimePlan(folder / "plan.json", recipe.part_seconds(part), costs)


def choose_losses(stages: Sequence[Stage], loss: str) -> list[Stage]:
    """Stages whose haystacks have the tasks' loss: on every token, "all", or on what the assistant says, "mask"."""
    haystacks = tuple(name(0).rstrip("0") for name in (haystack_part, recall_part))
    found: list[Stage] = []
    for stage in stages:
        source = stage.source
        assert isinstance(source, MixtureSource)
        parts = tuple(
            replace(part, loss=loss) if part.folders and part.folders[0].name.startswith(haystacks) else part
            for part in source.parts
        )
        found.append(
            replace(
                stage,
                source=MixtureSource(
                    source.tokenizer_folder, parts, source.seed, source.shape, source.rates, source.workers
                ),
            )
        )
    return found


def copy_model(source: Path, out: Path) -> None:
    """Copy a model folder to `out`, all or nothing."""
    with new_folder(out, overwrite=True) as unfinished:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
