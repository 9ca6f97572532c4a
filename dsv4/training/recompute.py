"""Activation checkpointing by policy: parts of the model keep their inputs alone and run again in the backward.

Applied from outside the model, for one forward and backward. The second forward computes the same bits, so gradients
are those without it; what the first one counts (expert loads, balance and indexer losses, clamped values) it does not
count again, and it runs the same experts chosen ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv4.analysis.activations import Recompute
from dsv4.model.attention import Attention
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.block import Block, ForwardContext
from dsv4.model.moe import MoE
from dsv4.model.recomputed import keeping_all

_PARTS: dict[Recompute, tuple[type[nn.Module], ...]] = {
    "none": (),
    "attention": (Attention,),
    "experts": (MoE,),
    "sublayers": (Attention, MoE),
    "blocks": (Block,),
}


@contextmanager
def recomputing(model: nn.Module, policy: Recompute) -> Generator[None]:
    """Forwards of `model` in this context keep what `policy` says; their backward must be in it too."""
    parts = [module for module in model.modules() if isinstance(module, _PARTS[policy])]
    try:
        for part in parts:
            part.forward = partial(_checkpointed, part.forward, part)
        yield
    finally:
        for part in parts:
            del part.forward  # the class's own again


def _checkpointed(forward: Callable[..., Tensor], part: nn.Module, *arguments: Any) -> Tensor:
    runs = 0

    def run(*given: Any) -> Tensor:
        nonlocal runs
        runs += 1
        with keeping_all():
            return forward(*given) if runs == 1 else _run_again(forward, part, given)

    result = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def _run_again(forward: Callable[..., Tensor], part: nn.Module, given: tuple[Any, ...]) -> Tensor:
    """The forward once more, with its side outputs dropped."""
    loads = [(module.load, module.load.copy()) for module in part.modules() if isinstance(module, MoE)]
    try:
        return forward(*map(_uncounted, given))
    finally:  # the checkpoint ends a forward by an exception once it has what it needs
        for load, before in loads:
            load[:] = before


def _uncounted(argument: Any) -> Any:
    if isinstance(argument, AuxLosses):
        return AuxLosses(argument.routing, entries=argument.entries)
    if isinstance(argument, ForwardContext) and argument.aux is not None:
        argument = copy(argument)
        argument.aux = AuxLosses(argument.aux.routing, entries=argument.aux.entries)
    return argument
