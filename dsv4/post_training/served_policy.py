"""The trained model in the engine: rollouts by the weights as they will be stored, without a second copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dsv4.engine import LLM
from dsv4.model.transformer import Transformer
from dsv4.training.qat import stored_weights


class ServedPolicy:
    """`model`, alternately trained and served. Options are those of `LLM`.

    `quantized`: the engine computes with the weights' stored values (FP4 experts, FP8 projections), as the training
    forward does under `stored_weights`; else with the fp32 masters.
    """

    def __init__(self, model: Transformer, tokenizer: Path | None, quantized: bool = True, **options: Any) -> None:
        self.model, self.quantized = model, quantized
        self._folder, self._options = tokenizer, options
        self._llm: LLM | None = None

    def set_options(self, **options: Any) -> None:
        """Further options of `LLM`, for the engine that serves from now on."""
        self._options |= options
        self._llm = None

    @contextmanager
    def serving(self) -> Iterator[LLM]:
        """Context in which the model is frozen and the engine serves it; afterwards it can be trained again.

        What took a gradient before takes one again. Prefixes of earlier weights are forgotten.
        """
        model = self.model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with stored_weights(model, indexers=False) if self.quantized else nullcontext():
            model.freeze()
            try:
                if self._llm is None:
                    self._llm = LLM(model, folder=self._folder, **self._options)
                yield self._llm
            finally:
                model.requires_grad_()
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name in trained)
