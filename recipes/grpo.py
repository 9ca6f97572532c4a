"""Train a model by GRPO: rollouts by the engine, rewards by scorers, known answers, or the model as a judge."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from dsv4.commands.recipe_flags import parse
from dsv4.post_training.frozen_models import load_frozen
from dsv4.post_training.grpo_run import GRPORun
from dsv4.post_training.recipe_run import run_recipe
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.served_policy import ServedPolicy


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    return run_recipe("grpo", GRPORecipe, parse("grpo", arguments), start)


def start(recipe: GRPORecipe, policy: ServedPolicy, options: argparse.Namespace, console: Console) -> GRPORun:
    """The run, at the step saved in its folder."""
    reference, run = None, recipe.run
    if recipe.objective.kl:
        reference = load_frozen(options.model, run.quantized, run.numerics, run.device)
    optimizer = recipe.optimizer.optimizer(policy.model, policy.model.config)
    service = recipe.service.service(run, recipe.sampling, options.model, options.run_dir, console)
    return GRPORun(
        policy, optimizer, recipe.source(), recipe.loop(), recipe.settings(), options.run_dir, reference,
        recipe.rubric_judge(policy.model, options.model), console=console, service=service,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
