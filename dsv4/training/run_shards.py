"""Folders of shards that a run trains on: their places, their shares, and what they held as it began."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dsv4.data.shards import ShardFolder, hash_file
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.stage_section import StageSection

SHARDS = "shards"  # a run's own, made of its text


def read_share(text: str) -> tuple[str, float]:
    """("folder", share) of "folder=share"; the share is 1 if it is left out, as only a folder without "=" may."""
    folder, given, share = text.rpartition("=")
    folder, share = (folder, share) if given else (share, "")
    try:
        found = float(share or 1)
    except ValueError as error:
        raise ValueError(
            f"shards {text}: FOLDER, or FOLDER=SHARE with a number, is allowed; a folder with = in it needs a share"
        ) from error
    if not 0.0 < found < math.inf:
        raise ValueError(f"shards {text}: the share is {share}; more than 0 is allowed")
    return folder, found


def place_in(run_dir: Path, folder: str) -> str:
    """A folder's path within a run's, so that the run may be moved; of one elsewhere the whole path."""
    run = run_dir.absolute()
    place = run / folder
    return str(place.relative_to(run) if place.is_relative_to(run) else place)


def placed_share(text: str, run_dir: Path) -> str:
    """FOLDER=SHARE from the command line as a run keeps it, which can be resumed from any folder."""
    folder, share = read_share(text)
    return f"{place_in(run_dir, str(Path(folder).absolute()))}={share:g}"


def stage_shards(recipe: PretrainRecipe, stage: StageSection, run_dir: Path) -> dict[str, float]:
    """Shares of a stage's folders of shards, by `place_in`: its own, or else the run's and those made of its text."""
    given = stage.shards or recipe.data.shards
    shares = {place_in(run_dir, folder): share for folder, share in map(read_share, given)}
    return shares if stage.shards or not recipe.data.text else shares | {SHARDS: 1.0}


def check_shards(folder: Path, tokenizer: Path) -> None:
    """ShardError if a folder of shards is not whole, or of another tokenizer; shards are hashed when they are read."""
    ShardFolder(folder, verify=False).check_tokenizer(hash_file(tokenizer / "tokenizer.json"))


def read_fingerprints(run_dir: Path) -> dict[str, str]:
    """Fingerprint of the data in each folder of shards, by its place (`place_in`), as the run began."""
    try:
        found = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
        return {place_in(run_dir, folder): fingerprint for folder, fingerprint in found.items()}
    except ValueError as error:
        raise ValueError(f"{run_dir / 'data.json'} is damaged: {error}") from error
