"""Fine-tune a model on conversations in OpenAI's message format: JSONL or Parquet, loss on the assistant's tokens.

The run is that of `dsv4 train pretrain` with other defaults, so its keys work here too, `lora.rank` among them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from dsv4.checkpoint.atomic import sole_writer
from dsv4.commands.recipe_flags import parse
from dsv4.data.records import MESSAGES, NoRecordsError, find_sources
from dsv4.data.shards import Counts
from dsv4.data.tokenizing import ShardWriter
from dsv4.model_folder import resolve_model
from dsv4.parallel.first_rank import on_first_rank
from dsv4.post_training.sft_preview import show_samples
from dsv4.post_training.sft_samples import Refusal, TurnSource, read_samples
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.training.recipe import split_words
from recipes import pretrain

# Of the keys of pre-training, those whose defaults differ; reasons: docs/post-training.md.
DEFAULTS = {
    "data.fill_in_middle": "0.0",
    "data.split_merged": "0.0",
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
        turns = [TurnSource(source, prompts, options.max_tokens) for source in sources]
        counts, refusals = on_first_rank("samples", lambda: write_samples(turns, folder, options, made))
    except (ValueError, OSError) as error:
        raise SystemExit(f"training stopped: {error}") from error
    told = console if not options.print_config else Console(stderr=True)  # whose output is a recipe
    told.print(f"{counts.documents:,} samples, {counts.tokens:,} tokens; {len(refusals):,} refused", highlight=False)
    if refusals:
        first = f"refused {refusals[0].place}: {refusals[0].reason}"
        told.print(f"{first}; --dry-run 0 lists all", style="red", markup=False, highlight=False)
    keys = run_keys(folder, run_dir / SAMPLES, options, options.epochs * counts.tokens)
    if any(word.startswith("lora.") for word in overrides):
        keys["run.quantized_share"] = "0.0"  # adapters are beside the stored matrices, not in them
    show = ["--print-config"] if options.print_config else []
    return pretrain.main([*(f"{key}={value}" for key, value in keys.items()), *overrides, *place, *show], "sft")


def write_samples(
    turns: list[TurnSource], folder: Path, options: argparse.Namespace, made: list[Path]
) -> tuple[Counts, list[Refusal]]:
    """Write the run's shards; their samples and tokens, and what was refused. ValueError if no sample is left."""
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
    return counts, all_refusals(turns)


def all_refusals(turns: list[TurnSource]) -> list[Refusal]:
    """What the reading of the sources has refused."""
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


def run_keys(folder: Path, samples: Path, options: argparse.Namespace, tokens: int) -> dict[str, str]:
    """Keys of the pre-training recipe for this run, before those of the command line."""
    return DEFAULTS | {
        "model.start": f'"{folder}"',
        "data.shards": f'["{samples}=1"]' if "=" in str(samples) else f'["{samples}"]',  # else the name has a share
        "stages.0.name": '"sft"',
        "stages.0.tokens": str(tokens),
        "stages.0.sequence": str(options.max_tokens),
    }


if __name__ == "__main__":
    sys.exit(main())
