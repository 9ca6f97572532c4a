"""The end of a run: its model folder, of one process or of several ranks, of which the first writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.parallel.first_rank import first_of_group, patient_group
from dsv4.training.export import export_adapter, export_model, export_tensors
from dsv4.training.loop import Trainer
from dsv4.training.lora import adapter_pairs
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.rank_loop import RankTrainer


def export_run(
    trainer: Trainer | RankTrainer, lora: LoraSettings | None, start: Path | None, run_dir: Path, out: Path
) -> None:
    """Write the trained model to `out`; with `lora` first the adapter of the model folder `start` to `run_dir`.

    All ranks call it together, and the first writes. Its error is raised on all of them.
    """
    ranks = trainer if isinstance(trainer, RankTrainer) else None
    group = None if ranks is None else patient_group()
    write: Callable[[], object]
    if lora is not None:
        assert start is not None
        pairs = adapter_pairs(trainer.model) if ranks is None else ranks.gather_adapters()
        write = partial(export_adapter, pairs, lora, start, run_dir / "adapter", out)
    elif ranks is None:
        write = partial(export_model, trainer.model, run_dir / "tokenizer", out)
    else:
        tensors = ranks.gather_tensors()
        write = partial(_export_gathered, tensors, trainer.model.config, run_dir / "tokenizer", out)
        if dist.get_rank() > 0:
            deque(tensors, maxlen=0)  # sends this rank's
    if group is None:
        write()
    else:
        first_of_group(write, group)


def _export_gathered(tensors: Iterator[tuple[str, Tensor]], config: ModelConfig, tokenizer: Path, out: Path) -> None:
    try:
        export_tensors(tensors, config, tokenizer, out)
    except Exception:
        deque(tensors, maxlen=0)  # which the other ranks go on sending
        raise
