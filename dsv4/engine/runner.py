"""ModelRunner: one ragged forward from scheduled chunks to logits, and to residual streams on request."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.engine.choices import ChoiceRecorder
from dsv4.engine.model import EngineCache, EngineModel, StreamingModel, TruncatableCache
from dsv4.engine.step import ScheduledChunk, StepOutput
from dsv4.model.batch import RaggedBatch


class ModelRunner:
    """Runs steps on one device.

    `keep_streams`: outputs also hold the residual streams of all tokens, if the model returns them. `recorder`: outputs
    also hold what the model notes of its choices.
    """

    def __init__(
        self,
        model: EngineModel,
        cache: EngineCache,
        device: torch.device,
        keep_streams: bool = False,
        recorder: ChoiceRecorder | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._truncatable = cache if isinstance(cache, TruncatableCache) else None
        self.keep_streams = keep_streams
        self.recorder = recorder
        self._streaming_model = model if isinstance(model, StreamingModel) else None

    @torch.inference_mode()
    def run(self, chunks: list[ScheduledChunk]) -> StepOutput:
        """Logits of every row that yields a token or scores one, ordered by chunk, then by token.

        Each chunk continues its request's cache slot, which then holds the tokens up to chunk.stop and the drafts.
        """
        batch = RaggedBatch.pack(
            [chunk.token_ids() for chunk in chunks],
            starts=[chunk.start for chunk in chunks],
            slots=[chunk.request.slot for chunk in chunks],
            device=self.device,
        )
        rows: list[int] = []
        scores: list[bool] = []  # of each row: True if it scores the prompt, False if it yields a token
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk.num_tokens
            if chunk.draft_token_ids and self._truncatable is not None:
                self._truncatable.expect_drafts(chunk.request.slot, chunk.stop, len(chunk.draft_token_ids))
            rows += (*range(start, start + chunk.num_scored), *range(end - chunk.num_samples, end))
            scores += [True] * chunk.num_scored + [False] * chunk.num_samples
        places = np.array(rows, dtype=np.int64)
        notes = None if self.recorder is None else self.recorder.notes(batch.num_tokens)
        told: dict[str, Any] = {} if notes is None else {"notes": notes}  # no word to models that know of none
        if self.keep_streams and self._streaming_model is not None:
            output = StepOutput(*self._streaming_model.next_token_logits_and_streams(batch, self.cache, places, **told))
        else:
            output = StepOutput(self.model.next_token_logits(batch, self.cache, places, **told))
        output.notes = notes
        return _split(output, torch.tensor(scores, device=self.device)) if any(scores) else output


def _split(output: StepOutput, scores: Tensor) -> StepOutput:
    """The rows that score the prompt apart from those that yield a token. scores: bool, one per row."""
    return StepOutput(output.logits[~scores], output.streams, output.logits[scores], output.notes)
