"""Program of one rank in tests: trains the tiny model and writes its losses."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.mesh import process_group
from dsv4.training.loop import Stage, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.schedule import Schedule

from ..training.tiny_training import Rows, draw_documents, make_model

STEPS = 6


@dataclass
class UnevenBatches:
    """Batches whose documents differ in length and number; every fifth is too short for the indexer."""

    def batch(self, step: int, /) -> Rows:
        if step % 5 == 3:
            return Rows(draw_documents(step, 3, 2))
        return Rows(draw_documents(step, 131 - step, 6, 45 + step))


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(Schedule(0.002, 2, 0.5, 0.1), quantized_share=0.34, save_every=2, **changes)


def main(
    run_dir: Path, degrees: dict[str, int], micro_batches: int, stop_after: int | None, changes: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    with process_group(timeout=120):
        model, _ = make_model()
        trainer = RankTrainer(
            model, {"compute_dtype": torch.float32}, [Stage("all", 1.0, UnevenBatches())],
            settings(micro_batches=micro_batches, **changes), FixedPlan(STEPS), run_dir, Degrees(**degrees), quiet=True,
        )  # fmt: skip
        trainer.run(stop_after)
        whole = trainer.gather_model()
        if os.environ["RANK"] == "0":
            torch.save(whole.state_dict(), run_dir / "whole.pt")


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    main(
        Path(options["run_dir"]),
        options["degrees"],
        options["micro_batches"],
        options["stop_after"],
        options["changes"],
    )
