"""Command and recipe of a whole run as anyone would give them anywhere, without this machine's paths."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.post_training.v4_recipe import V4Recipe
from dsv4.training.run_shards import read_share

# Flags whose words are shown, and what stands for a path: of a flag, or of a key of the recipe.
FLAGS = ("corpus", "budget", "base_model", "sft_model")
PLACES = {"corpus": "corpus", "nano.data.corpus": "corpus", "base_model": "BASE", "sft_model": "SFT"}


def show_command(words: Sequence[str], flags: Mapping[str, Any]) -> str:
    """`dsv4 train v4` with flags, and `words`: a recipe's file and keys. What is not given is not shown."""
    found = ["dsv4", "train", "v4"]
    for name in FLAGS:
        if flags.get(name):
            found += [f"--{name.replace('_', '-')}", PLACES.get(name, flags[name])]
    for word in words:
        key, sign, value = word.partition("=")
        is_path = key in PLACES and value.strip("'\"")  # an empty corpus is none
        found.append(f"{key}={PLACES[key]}" if is_path else word if sign else Path(word).name)
    return shlex.join([*found, "--run-dir", "runs/v4"])


def repeated_command(recipe: V4Recipe) -> str:
    """Command of the same run by its own v4.toml, as `without_paths` leaves it."""
    return show_command(
        ["v4.toml"],
        {"corpus": recipe.nano.data.corpus, "base_model": recipe.base_model, "sft_model": recipe.sft_model},
    )


def without_paths(recipe: V4Recipe) -> V4Recipe:
    """The recipe with BASE, SFT and `corpus` in place of paths, and names alone of other files."""
    models = {name: PLACES[name] for name in ("base_model", "sft_model") if getattr(recipe, name) is not None}
    nano = recipe.nano
    if nano.data.corpus:
        nano = nano.model_copy(update={"data": nano.data.model_copy(update={"corpus": PLACES["corpus"]})})
    student = recipe.student
    texts = [f"{Path(folder).name}={share!r}" for folder, share in map(read_share, student.distillation.texts)]
    data = tuple(Path(name).name for name in student.problems.data)
    student = student.model_copy(
        update={
            "distillation": student.distillation.model_copy(update={"texts": tuple(texts)}),
            "problems": student.problems.model_copy(update={"data": data}),
        }
    )
    return recipe.model_copy(update={**models, "nano": nano, "student": student})
