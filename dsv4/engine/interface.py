"""Interfaces of an engine and of its model, as far as a server uses them: `AsyncEngine` and `process.EngineProcess`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from dsv4.config import ModelConfig
from dsv4.engine.fairness import User
from dsv4.engine.metrics import MetricRegistry
from dsv4.engine.outputs import EventStream, TokenStream
from dsv4.engine.sampling_params import SamplingParams
from dsv4.model.token_trace import TokenTrace
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder

MAX_TRACED_TOKENS = 1 << 16  # of a sequence whose last token is traced: all are computed again


class TextModel(Protocol):
    """A model without its weights: what turns conversations to token ids and back. `LLM` is one."""

    max_model_len: int

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path | None: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def prompts(self) -> PromptEncoder | None: ...


class Engine(Protocol):
    """Computes concurrent requests; its methods are documented in `AsyncEngine`."""

    @property
    def llm(self) -> TextModel: ...

    @property
    def error(self) -> BaseException | None: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def metrics(self) -> MetricRegistry: ...

    def stream(self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)) -> TokenStream: ...

    def stream_with_progress(
        self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)
    ) -> EventStream: ...

    async def trace(self, token_ids: list[int]) -> TokenTrace: ...

    def check_room(self) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...
