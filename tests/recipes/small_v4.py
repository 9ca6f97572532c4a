"""The whole recipe at a toy size."""

from __future__ import annotations

from pathlib import Path

from dsv4.config import nano_path
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.v4_recipe import DOMAINS
from dsv4.training.export import export_model
from recipes import nano, pretrain, v4
from tests.post_training.small_policy import small_policy


def small_base(root: Path) -> Path:
    """A small model folder."""
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def keys() -> list[str]:
    """Everything small: two steps of each run, two questions of each domain."""
    short = ["sampling.prompts=2", "sampling.max_tokens=4", "sampling.max_model_len=1024", "run.steps=2"]
    short += ["run.save_every=1"]
    found = [f"student.{key}" for key in short]
    for domain in DOMAINS:
        place = f"specialists.{domain}"
        found += [f"{place}.grpo.{key}" for key in (*short, "objective.group_size=2", "objective.resample=1")]
        found += [f"{place}.conversations=4", f"{place}.sft.steps=2", f"{place}.sft.save_every=1"]
        found += [f"{place}.sft.row_tokens=1024", f"{place}.sft.batch_tokens=1024", f"{place}.sft.precision=fp32"]
    found += [f"general.grpo.{key}" for key in (*short, "objective.group_size=2", "objective.resample=1")]
    for name in ("mixed", "student_sft"):
        found += [f"{name}.row_tokens=1024", f"{name}.batch_tokens=1024", f"{name}.precision=fp32"]
    found += ["student_sft.steps=2", "student_sft.save_every=1"]
    found += ["evaluation.questions=2", "evaluation.max_tokens=4", "nano.steps=2", "nano.sft.run.precision=fp32"]
    for stage in ("nano.sft.stages.0", "nano.sft.stages.1"):
        found += [f"{stage}.{key}" for key in ("sequence=256", "row_tokens=512", "batch_tokens=512", "tokens=512")]
    return [*found, "nano.sft.data.group_rows=4", "nano.sft.run.replicas=1"]


def without_pictures(words: list[str]) -> int:
    """`dsv4 train v4` in a process of its own, without the pictures of losses, which take long."""
    for module in (nano, pretrain):
        module.draw_run = lambda run_dir: None
    return v4.main(words)
