"""Texts beside a student's samples: documents of shards, on which it is held to a teacher that has read them.

On its own samples alone a student forgets what no domain asks for: steps of Muon are as large where little is left to
learn as where much is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from dsv4.config import ModelConfig
from dsv4.data.shard_loader import RowShape
from dsv4.data.shards import Index
from dsv4.post_training.rollouts import Rollout
from dsv4.training.run_shards import check_shards
from dsv4.training.sources import MixtureSource, PartPaths

TEXTS = "texts"  # name of their teacher


class GivenTexts:
    """Documents of folders of shards, by their shares: about `tokens` tokens for each step, a function of its number.

    ShardError if a folder is damaged, or of another tokenizer than that of the model in `model`.
    """

    def __init__(self, shares: Mapping[Path, float], tokens: int, model: Path, seed: int) -> None:
        for folder in shares:
            check_shards(folder, model)
        prints = {folder: Index.read(folder).fingerprint for folder in shares}
        self._prints = {str(folder.absolute()): found for folder, found in prints.items()}
        # Named by what they hold: their order does not depend on where they lie.
        parts = [PartPaths(prints[folder], (folder,), share, "all") for folder, share in shares.items()]
        ratios = (ratio for ratio in ModelConfig.from_pretrained(model).compress_ratios if ratio)
        shape = RowShape(tokens, tokens, alignment=math.lcm(*ratios))
        self._source = MixtureSource(model, tuple(parts), seed, shape)

    @property
    def note(self) -> str:
        """Folders and what they hold, as a run notes them."""
        return json.dumps(self._prints, indent=2) + "\n"

    def of_step(self, step: int) -> list[Rollout]:
        """Documents of a step, each as if all but its first token had been sampled, with unknown log-probabilities."""
        documents = [tuple(ids) for ids in self._source.batch(step).documents if len(ids) > 1]
        return [Rollout(place, ids[:1], ids[1:], (), "", True) for place, ids in enumerate(documents)]
