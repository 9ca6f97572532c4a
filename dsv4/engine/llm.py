"""LLM: a model folder as a generator of text. The engine's plain, synchronous face."""

from __future__ import annotations

import threading
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import cast

import torch

from dsv4.checkpoint.mapped import mapped_files
from dsv4.config import ModelConfig, nano_path
from dsv4.engine.core import CoreLimits, EngineCore
from dsv4.engine.outputs import RequestOutput, TokenEvent
from dsv4.engine.runner import EngineModel, ModelRunner
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.scheduler import Scheduler, SchedulerConfig
from dsv4.engine.waiting import WaitingLimits
from dsv4.model.transformer import Transformer
from dsv4.text import check_text
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder, effort_ladder

DEFAULT_MAX_MODEL_LEN = 131072  # the cache takes memory as tokens come, so a long limit costs nothing by itself

Prompt = str | list[int]


class LLM:
    """One loaded model that generates. `LLM()` is the embedded nano model.

    `model`: a model folder, or a model object, which is frozen (`Transformer.freeze`); `folder` is then where its
    tokenizer and prompt settings are. Without a tokenizer prompts are token ids and so is the output; text raises
    ValueError. `max_model_len` bounds prompt and
    output together; by default it is the model's own limit, at most 131072. `dtype`: "auto", "bfloat16", "float32" or a
    torch.dtype, of a folder's matrices and of the cache; auto is float32 on the CPU, bfloat16 on a GPU. A folder that
    cannot fit into memory is a CapacityError before it is read, unless `check_memory` is False. `max_num_waiting` and
    `max_waiting_tokens` bound the queue of an AsyncEngine; `generate` takes any number of prompts.
    `check_values`: as of `dsv4.load`.
    """

    def __init__(
        self,
        model: str | Path | EngineModel | None = None,
        *,
        folder: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype | str = "auto",
        numerics: str = "float",
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 1024,
        max_num_waiting: int = WaitingLimits.max_num_waiting,
        max_waiting_tokens: int = WaitingLimits.max_waiting_tokens,
        check_memory: bool = True,
        check_values: bool = True,
    ) -> None:
        _check_device(device)
        self.waiting_limits = WaitingLimits(max_num_waiting, max_waiting_tokens)
        step_limits = SchedulerConfig(max_num_seqs, max_num_batched_tokens)
        if model is None or isinstance(model, (str, Path)):
            folder = nano_path() if model is None else Path(model)
            length = max_model_len or DEFAULT_MAX_MODEL_LEN
            model = _load(Path(folder), device, dtype, numerics, max_num_seqs, length, check_memory, check_values)
        if isinstance(model, Transformer) and not model.frozen:
            model.freeze()
        self.path: Path | None = None if folder is None else Path(folder)
        self.config = model.config
        self.tokenizer = tokenizer = _find_tokenizer(self.path)
        self.prompts: PromptEncoder | None = None
        if self.path is not None and tokenizer is not None:
            self.prompts = PromptEncoder(tokenizer, effort_ladder(self.path))
        self.max_model_len = _resolve_max_model_len(max_model_len, self.config)
        scheduler = Scheduler(step_limits)
        runner = ModelRunner(model, max_num_seqs, self.max_model_len, torch.device(device))
        limits = CoreLimits(
            self.config.vocab_size,
            self.config.eos_token_ids,
            self.max_model_len,
            text_vocab_size=0 if tokenizer is None else tokenizer.vocab_size,
            new_decoder=None if tokenizer is None else tokenizer.decode_stream,
        )
        files = mapped_files(model)
        self.core = EngineCore(runner, scheduler, limits, None if files is None else files.change)
        self._in_use = threading.Lock()  # the core serves one caller at a time

    @property
    def name(self) -> str:
        """How the model calls itself to clients: the folder's name, with "dsv4-" before the embedded model's."""
        if self.path is None:
            return "dsv4"
        name = self.path.resolve().name
        return f"dsv4-{name}" if name == "nano" else name

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs are in the prompts' order.

        A str is plain text (special spellings in it stay text) after a begin-of-sentence token; a list of ids is taken
        as it is. One SamplingParams serves all prompts, or a list gives each its own. Raises ValueError for a prompt
        that cannot run, before anything is computed, and EngineError where the model's numbers are no longer numbers.
        """
        batch = _as_batch(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(batch)
        else:
            params = list(sampling_params)
            if len(params) != len(batch):
                raise ValueError(f"{len(params)} sampling_params for {len(batch)} prompts; give one, or one a prompt")
        sequences = [
            self.core.new_sequence(self.encode(prompt, f"prompt {place}"), param)
            for place, (prompt, param) in enumerate(zip(batch, params, strict=True))
        ]
        self.claim()
        try:
            for sequence in sequences:
                self.core.add(sequence)
            while self.core.has_work:
                self.core.step()
        finally:  # an error or Ctrl-C leaves nothing behind in the scheduler
            for sequence in sequences:
                self.core.abort(sequence)
            self.release()
        return [sequence.output for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TokenEvent, None, None]:
        """Completes one prompt and yields its tokens as they come; closing the generator stops the request."""
        sequence = self.core.new_sequence(self.encode(prompt), params or SamplingParams())
        self.claim()
        try:
            self.core.add(sequence)
            while not sequence.finished:
                for _, event in self.core.step():
                    yield event
        finally:
            self.core.abort(sequence)
            self.release()

    def claim(self) -> None:
        """Makes the caller the engine's only user; RuntimeError when it has one."""
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "this LLM is busy: a generate or stream call, or an AsyncEngine, is using it;"
                " for many requests at a time use AsyncEngine"
            )

    def release(self) -> None:
        self._in_use.release()

    def encode(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """Token ids of a prompt: text after a begin-of-sentence token, ids as they are.

        ValueError, beginning with `name`, for an empty text or half a surrogate pair; and, before it is tokenised, for
        a text that cannot fit by its length.
        """
        if isinstance(prompt, (bytes, bytearray)):  # pyright: ignore[reportUnnecessaryIsInstance]  # numbers, to Python
            raise ValueError(f"{name} is {type(prompt).__name__}; allowed: text (str), or a list of token ids")
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            where = f" {self.path}" if self.path is not None else ""
            raise ValueError(f"the model{where} has no tokenizer, so a prompt must be a list of token ids, not text")
        if not prompt:
            raise ValueError(f"{name} is an empty text; it needs at least 1 character")
        check_text(prompt, name)
        least = 1 + self.tokenizer.min_tokens(prompt)
        if least > self.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested at least"
                f" {least} tokens ({least} in the prompt, 0 in the completion). Please reduce the length of the prompt."
            )
        return [self.config.bos_token_id, *self.tokenizer.encode(prompt)]


def _as_batch(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    """A lone prompt becomes a batch of one."""
    if isinstance(prompts, (str, bytes, bytearray)):
        return [cast(Prompt, prompts)]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("list[int]", list(prompts))]
    return list(cast("SequenceOf[Prompt]", prompts))


def _check_device(device: str) -> None:
    """ValueError for what torch does not know, and for a CUDA device that this machine has not."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed: cpu, cuda or cuda:N") from error
    found = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        raise ValueError(f"device is {device!r}; torch finds {found} CUDA devices here")


def _resolve_max_model_len(requested: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if requested is None:
        return min(limit, DEFAULT_MAX_MODEL_LEN)
    if not 2 <= requested <= limit:
        raise ValueError(f"max_model_len is {requested}; allowed: [2, {limit}] (the model's max_position_embeddings)")
    return requested


def _find_tokenizer(path: Path | None) -> Tokenizer | None:
    """The folder's tokenizer; a folder without one is a model for token ids alone."""
    return Tokenizer.from_pretrained(path) if path is not None and (path / "tokenizer.json").is_file() else None


def _load(
    folder: Path,
    device: str,
    dtype: torch.dtype | str,
    numerics: str,
    max_num_seqs: int,
    max_model_len: int,
    check_memory: bool,
    check_values: bool,
) -> EngineModel:
    from dsv4.engine.loading import load, resolve_dtype

    return load(
        folder,
        device,
        resolve_dtype(dtype, device),
        numerics,
        max_num_seqs,
        max_model_len,
        check_memory,
        check_values,
    )
