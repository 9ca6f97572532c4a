"""Folder of a pre-training run: made once with tokenizer, config, shards and recipe; checked as the run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dsv4.checkpoint.atomic import new_file, new_folder
from dsv4.config import ModelConfig
from dsv4.data.records import find_sources
from dsv4.data.shards import Index, hash_file
from dsv4.data.tokenizing import ShardWriter
from dsv4.model_folder import resolve_model
from dsv4.tokenizer import Tokenizer
from dsv4.training.export import TOKENIZER_FILES
from dsv4.training.handover import has_state
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.recipe import read_recipe, write_recipe
from dsv4.training.run_shards import SHARDS, check_shards, placed_share, read_fingerprints, stage_shards
from dsv4.training.start import fingerprint


def new_run(recipe: PretrainRecipe, run_dir: Path, console: Console) -> PretrainRecipe:
    """Make a run's folder: tokenizer, model config, shards of its text, recipe.toml, data.json.

    A run is never overwritten.
    """
    if (run_dir / "data.json").exists():
        raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    recipe = recipe.resolve()
    data = recipe.data
    for stage in recipe.stages:
        tasks = data.tasks if stage.tasks is None else stage.tasks
        if not (data.text or data.shards or stage.shards or tasks):
            raise ValueError(f"stage {stage.name!r} has no data: give data.text, data.shards or data.tasks")
    source = recipe.model.tokenizer if data.tokenizer is None else resolve_model(data.tokenizer)
    check_tokenizer(recipe, source)
    config = recipe.model.config()
    place_tokenizer(source, run_dir / "tokenizer")
    size = Tokenizer.from_pretrained(run_dir / "tokenizer").vocab_size
    if recipe.model.start is None:
        config = replace(config, vocab_size=size)
    elif size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {source} has {size} tokens, but {recipe.model.start} is for {config.vocab_size}"
        )
    recipe = recipe.model_copy(
        update={
            "data": data.model_copy(update={"shards": tuple(placed_share(one, run_dir) for one in data.shards)}),
            "stages": tuple(
                stage.model_copy(update={"shards": tuple(placed_share(one, run_dir) for one in stage.shards)})
                for stage in recipe.stages
            ),
        }
    )
    folders = {folder for stage in recipe.stages for folder in stage_shards(recipe, stage, run_dir)}
    for folder in sorted(folders - {SHARDS}):  # before the text is tokenized, which may take long
        check_shards(run_dir / folder, run_dir / "tokenizer")
    if data.text:
        sources = find_sources(list(data.text), data.column)
        writer = ShardWriter(sources, run_dir / "tokenizer", run_dir / SHARDS)
        console.print(f"text: {writer.run().counts.tokens:,} tokens", highlight=False)
    prints = {folder: Index.read(run_dir / folder).fingerprint for folder in sorted(folders)}
    texts = {"config.json": json.dumps(config.to_dict(), indent=2) + "\n", "recipe.toml": write_recipe(recipe)}
    if recipe.model.start is not None:
        texts["start.json"] = json.dumps({"fingerprint": fingerprint(Path(recipe.model.start))}) + "\n"
    texts["data.json"] = json.dumps(prints, indent=2) + "\n"  # last: a folder with it holds a run
    for name, text in texts.items():
        with new_file(run_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return recipe


def place_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files to a run's `folder`, which may be an earlier such copy, or `source` itself.

    ValueError if it holds anything else, which the run's model folder would get.
    """
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    if not folder.is_dir() or not any(folder.iterdir()):
        with new_folder(folder, overwrite=False) as unfinished:
            for name, content in files.items():
                (unfinished / name).write_bytes(content)
    elif {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()} != files:
        raise ValueError(
            f"{folder} holds something else than a copy of {source}'s {', '.join(TOKENIZER_FILES)}; rename it, or give "
            "another --run-dir"
        )


def resume_run(run_dir: Path, words: list[str]) -> PretrainRecipe:
    """Read the run's recipe and check that the data is what it was."""
    if any(not word.startswith("parallel.") for word in words):
        raise ValueError(f"--resume goes on with the run's own recipe but for parallel.*; without {' '.join(words)}")
    if not (run_dir / "data.json").exists():
        raise ValueError(f"--resume: {run_dir} holds no run (no data.json)")
    begun = read_recipe(PretrainRecipe, run_dir / "recipe.toml")
    recipe = read_recipe(PretrainRecipe, run_dir / "recipe.toml", words)
    recipe.check_ranks(ModelConfig.from_pretrained(run_dir))
    for stage in recipe.stages:
        before, now = stage.size(begun.processes), stage.size(recipe.processes)
        if (before.tokens * before.last, before.tokens * before.first) != (
            now.tokens * now.last,
            now.tokens * now.first,
        ):
            raise ValueError(
                f"--resume: steps of stage {stage.name!r} had {before.tokens * before.last} tokens and would have "
                f"{now.tokens * now.last}: set batch_tokens when a run is to go on with other ranks"
            )
        if (before.ramp, stage.num_steps(begun.processes)) != (now.ramp, stage.num_steps(recipe.processes)):
            raise ValueError(
                f"--resume: steps of stage {stage.name!r} grow by multiples of {before.tokens} tokens on "
                f"{begun.processes} processes and would grow by multiples of {now.tokens} on {recipe.processes}, so "
                "that rows would be left out or taken twice; allowed: parallel.data x parallel.expert of "
                f"{begun.processes // begun.run.replicas}, with any context and pipeline"
            )
    for folder, began in read_fingerprints(run_dir).items():
        if Index.read(run_dir / folder).fingerprint != began:
            raise ValueError(f"--resume: {folder} holds other data than the run began with")
    check_start(recipe, run_dir)
    return recipe


def check_tokenizer(recipe: PretrainRecipe, source: Path) -> None:
    """ValueError if data.tokenizer is another than the start's, whose ids mean other texts."""
    if recipe.model.start is None:
        return
    own = Path(recipe.model.start) / "tokenizer.json"
    if own.is_file() and hash_file(own) != hash_file(source / "tokenizer.json"):
        raise ValueError(f"data.tokenizer {source} is another tokenizer than that of {recipe.model.start}")
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{recipe.model.start} has no tokenizer.json; give data.tokenizer")


def check_start(recipe: PretrainRecipe, run_dir: Path) -> None:
    """ValueError if the run still needs the weights that it began with, and they are others now."""
    if recipe.model.start is None or (recipe.lora.rank is None and has_state(run_dir)):
        return
    began = json.loads((run_dir / "start.json").read_text(encoding="utf-8"))["fingerprint"]
    if fingerprint(Path(recipe.model.start)) != began:
        raise ValueError(f"--resume: {recipe.model.start} holds other weights than the run began with")
