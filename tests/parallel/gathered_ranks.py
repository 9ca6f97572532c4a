"""Run of test_gathered.py on one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv4.analysis.activations import Recompute
from dsv4.model.attention import Attention
from dsv4.model.moe import Experts
from dsv4.training.gradient import Work
from dsv4.training.losses import LossWeights
from dsv4.training.qat import as_stored
from dsv4.training.start import drawn_values
from tests.parallel.piece_ranks import make_trainer
from tests.training.tiny_training import CONFIG, SEED, make_model


def quantized_step(folder: Path, recompute: Recompute) -> dict[str, Any]:
    """What two data ranks see in a step on stored values.

    wrong: parameters of the blocks that have others in forward or backward; checked: how many were looked at in each;
    most: bytes of blocks' parameters that were whole at once; largest: those of the largest block.
    """
    whole = {name: p.detach() for name, p in make_model()[0].named_parameters()}
    trainer = make_trainer(folder, {"data": 2}, values=drawn_values(CONFIG, torch.Generator().manual_seed(SEED)))
    model = trainer.model
    checked, wrong, most = {"forward": 0, "backward": 0}, set[str](), 0

    def look(path: str, when: str, *_: Any) -> None:
        nonlocal most
        for name, parameter in model.get_submodule(path).named_parameters(path):
            if isinstance(parameter, DTensor) or (".experts." in name) != path.endswith(".experts"):
                continue
            checked[when] += 1
            if not torch.equal(parameter.detach(), as_stored(name, whole[name])):
                wrong.add(f"{when} {name}")
        blocks = {n: p for n, p in model.layers.named_parameters() if p.requires_grad and not isinstance(p, DTensor)}
        most = max(most, sum(p.nbytes for p in blocks.values()))

    def seen(path: str, compute: Callable[..., Tensor], *given: Any) -> Tensor:
        look(path, "forward")
        output = compute(*given)
        if given[0] != "w2":  # the last product's backward begins that of the experts: it is looked at behind it
            assert output.grad_fn is not None
            output.grad_fn.register_prehook(partial(look, path, "backward"))
        return output

    # Within the blocks, whose own hooks gather: a product of each layer's experts, and the attention before them.
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            patch.object(module, "product", partial(seen, path, module.product)).start()
        elif isinstance(module, Attention) and path.startswith("layers."):
            patch.object(module, "forward", partial(seen, path.removesuffix(".attn"), module.forward)).start()
    with trainer._processes() as ranks:
        ranks.gradient(Work(0, 0, LossWeights(), quantized=True, recompute=recompute))
    largest = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in model.layers)
    left = [name for name, p in model.named_parameters() if not isinstance(p, DTensor) and p.requires_grad]
    return {"wrong": wrong, "checked": checked, "most": most, "largest": largest, "left": left}
