"""Fine-tune a model on conversations in OpenAI's message format: JSONL or Parquet, loss on the assistant's tokens.

The run is that of `dsv4 train pretrain` with other defaults, so its keys work here too, `lora.rank` among them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from dsv4.checkpoint.atomic import sole_writer
from dsv4.commands.recipe_flags import parse
from dsv4.data.records import MESSAGES, NoRecordsError, find_sources
from dsv4.data.shards import Counts, Index
from dsv4.data.tokenizing import ShardWriter
from dsv4.model_folder import resolve_model
from dsv4.parallel.first_rank import on_first_rank
from dsv4.post_training.sft_preview import show_samples
from dsv4.post_training.sft_samples import Refusal, TurnSource, read_samples
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.pretrain_run import mixture_source
from dsv4.training.recipe import split_words
from dsv4.training.sources import PartPaths
from recipes import pretrain

# Of the keys of pre-training, those whose defaults differ; reasons: docs/post-training.md.
DEFAULTS = {
    "data.fill_in_middle": "0.0",
    "data.split_merged": "0.0",
    "data.tasks_loss": "mask",
    "data.whole_documents": "true",
    "optimizer.rate": "2e-4",
    "optimizer.warmup_steps": "10",
    "optimizer.decay_fraction": "1.0",
    "optimizer.balance_speed": "0.0",
    "run.quantized_share": "1.0",
}
SAMPLES = "samples"  # folder of the run's shards


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    options = parse("sft", arguments)
    run_dir: Path = options.run_dir
    place = ["--run-dir", str(run_dir), *(["--out", str(options.out)] if options.out else [])]
    if options.resume:
        if options.model or options.words:
            raise SystemExit("training stopped: --resume goes on with the run's own model, data and keys")
        return pretrain.main([*place, "--resume"], "sft")
    if options.ids and options.dry_run is None:
        raise SystemExit("training stopped: --ids shows the tokens of a dry run; give --dry-run N too")
    if options.model is None:
        raise SystemExit("training stopped: no model; give the folder of one, and data")
    console = Console(quiet=int(os.environ.get("RANK", "0")) > 0)
    made: list[Path] = []
    try:
        return run_samples(options, place, console, made)
    except BaseException:
        if not (options.run_dir / "data.json").exists():
            for samples in made:
                shutil.rmtree(samples, ignore_errors=True)
            if made and options.run_dir.is_dir() and not any(options.run_dir.iterdir()):
                options.run_dir.rmdir()
        raise


def run_samples(options: argparse.Namespace, place: list[str], console: Console, made: list[Path]) -> int:
    """Write the samples and train on them. `made` gets their folder if there was none, to be removed on an error."""
    run_dir: Path = options.run_dir
    data, overrides = split_words(options.words)
    try:
        folder = resolve_model(options.model)
        prompts = PromptEncoder.from_pretrained(folder)
        sources = find_sources(data, MESSAGES)
        if not sources:
            raise ValueError("no data; give files or folders of conversations (.jsonl, .parquet)")
        if options.dry_run is not None:
            items = read_samples(sources, prompts, options.max_tokens)
            shown: int = options.dry_run
            refused = 20 if shown else None  # --dry-run 0 is for these
            samples, _ = show_samples(items, prompts.tokenizer, console, shown, refused, options.ids)
            return 0 if samples else 1
        if (run_dir / "data.json").exists() and not options.print_config:
            raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
        keys = run_keys(folder, run_dir / SAMPLES, options)
        if any(word.startswith("lora.") for word in overrides):
            keys["run.quantized_share"] = "0.0"  # adapters are beside the stored matrices, not in them
        words = [*(f"{key}={value}" for key, value in keys.items()), *overrides]
        turns = [TurnSource(source, prompts, options.max_tokens) for source in sources]
        written = on_first_rank("samples", lambda: write_samples(turns, folder, options, words, made))
    except (ValueError, OSError) as error:
        raise SystemExit(f"training stopped: {error}") from error
    told = console if not options.print_config else Console(stderr=True)  # whose output is a recipe
    counts, refusals = written.counts, written.refusals
    told.print(f"{counts.documents:,} samples, {counts.tokens:,} tokens; {len(refusals):,} refused", highlight=False)
    if refusals:
        first = f"refused {refusals[0].place}: {refusals[0].reason}"
        told.print(f"{first}; --dry-run 0 lists all", style="red", markup=False, highlight=False)
    show = ["--print-config"] if options.print_config else []
    return pretrain.main([*run_length(words, written.run_tokens), *words, *place, *show], "sft")


def run_length(words: list[str], tokens: int) -> list[str]:
    """Key of the run's length, that of its epochs, unless `words` have another."""
    return [] if any(word.startswith("stages.0.steps=") for word in words) else [f"stages.0.tokens={tokens}"]


@dataclass(frozen=True)
class Written:
    """Contents of the run's shards, refused rows, and tokens of the full rows that hold the samples of all epochs."""

    counts: Counts
    refusals: list[Refusal]
    run_tokens: int


def write_samples(
    turns: list[TurnSource], folder: Path, options: argparse.Namespace, words: list[str], made: list[Path]
) -> Written:
    """Write the run's shards. ValueError if no sample is left, or if the recipe of `words` is wrong."""
    recipe = pretrain.given_recipe([*run_length(words, 1), *words]).resolve()  # its length follows from the samples
    if (sequence := recipe.stages[0].sequence) < options.max_tokens:
        raise ValueError(
            f"stages.0.sequence is {sequence}, at which samples of up to {options.max_tokens} tokens would be cut; "
            f"allowed: {options.max_tokens} or more, or a smaller --max-tokens"
        )
    with shard_folder(options, made) as shards:
        try:
            counts = ShardWriter(turns, folder, shards).run().counts
        except NoRecordsError as error:
            if not (refused := all_refusals(turns)):
                raise
            raise ValueError(
                f"no sample is left: {len(refused):,} refused, the first {refused[0].place}: {refused[0].reason}; "
                "--dry-run 0 lists all"
            ) from error
        return Written(counts, all_refusals(turns), epoch_tokens(recipe, folder, shards, options, counts))


def epoch_tokens(
    recipe: PretrainRecipe, folder: Path, shards: Path, options: argparse.Namespace, counts: Counts
) -> int:
    """Tokens of the full rows in which every sample comes once per epoch; beside other data, tokens of the epochs."""
    stage, data = recipe.stages[0], recipe.data
    tasks = data.tasks if stage.tasks is None else stage.tasks
    given = stage.shards or data.shards
    if tasks or data.text or given != (shards_word(options.run_dir / SAMPLES),):
        return options.epochs * counts.tokens
    part = PartPaths(Index.read(shards).fingerprint, (shards,))
    source = mixture_source(recipe, 0, folder, [part], recipe.model.config())
    return source.open().epoch_rows(options.epochs) * stage.row_tokens


def all_refusals(turns: list[TurnSource]) -> list[Refusal]:
    """Rows that the reading of the sources has refused."""
    return [refusal for source in turns for refusal in source.refusals]


@contextmanager
def shard_folder(options: argparse.Namespace, made: list[Path]) -> Iterator[Path]:
    """Folder of the run's shards; for --print-config, which makes no run, one that is removed again."""
    if not options.print_config:
        samples = options.run_dir / SAMPLES
        with sole_writer(options.run_dir):
            if not samples.exists():
                made.append(samples)
            yield samples
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def run_keys(folder: Path, samples: Path, options: argparse.Namespace) -> dict[str, str]:
    """Keys of the pre-training recipe for this run but its length, before those of the command line."""
    return DEFAULTS | {
        "model.start": f'"{folder}"',
        "data.shards": json.dumps([shards_word(samples)], ensure_ascii=False),
        "stages.0.name": '"sft"',
        "stages.0.sequence": str(options.max_tokens),
    }


def shards_word(samples: Path) -> str:
    """FOLDER of the samples, or FOLDER=1 if a part of its name could be taken for a share."""
    return f"{samples}=1" if "=" in str(samples) else str(samples)


if __name__ == "__main__":
    sys.exit(main())
