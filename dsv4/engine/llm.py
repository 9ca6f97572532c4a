"""LLM: a model folder as a generator of text. The engine's plain, synchronous face."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from dsv4.cache import Cache
from dsv4.cache.disk import CacheFolder, DiskCache, least_bytes
from dsv4.checkpoint.expert_memory import ExpertMemory
from dsv4.checkpoint.mapped import mapped_files
from dsv4.config import WINDOW
from dsv4.engine.cache_manager import CacheManager
from dsv4.engine.cache_size import CacheSize, cache_size
from dsv4.engine.choices import new_recorder
from dsv4.engine.config import EngineConfig, WindowPolicy
from dsv4.engine.core import CoreLimits, EngineCore
from dsv4.engine.disk_prefixes import DiskPrefixes
from dsv4.engine.draft_length import AdaptiveLength
from dsv4.engine.errors import too_long
from dsv4.engine.grammar import GrammarCompiler
from dsv4.engine.loading import cache_room, check_device, limit_expert_memory, load
from dsv4.engine.metric_sources import DiskCacheMetrics, ExpertLoadMetrics, ExpertMemoryMetrics
from dsv4.engine.metrics import MetricSource
from dsv4.engine.model import DraftingModel, EngineCache, EngineModel
from dsv4.engine.model_identity import model_identity
from dsv4.engine.outputs import RequestOutput, TokenEvent
from dsv4.engine.runner import ModelRunner
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.speculative import MTPDrafter, Speculator
from dsv4.model.transformer import Transformer
from dsv4.model_folder import model_name, resolve_model
from dsv4.options import check_keywords, takes_options
from dsv4.text import check_text
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder, effort_ladder

Prompt = str | list[int]
_ALLOWED = "text (str), or a list of token ids (int)"


class LLM:
    """One loaded model that generates. `LLM()` is the embedded nano model.

    `model`: a model folder, owner/name[@revision] of the Hugging Face Hub, which is fetched (HubError where it cannot
    be), or a model object, which is frozen (`Transformer.freeze`); `folder` is then where its tokenizer and prompt
    settings are. Without a tokenizer prompts are token ids and so is the output; text raises ValueError.

    `options`: fields of EngineConfig; `engine_config` has all of them, and options beside it replace some. TypeError
    for an unknown option. Sizes are bytes, or a text: "4G". `max_model_len` bounds prompt and output together; by
    default it is the model's own limit, as far as memory holds it (`cache_size` says how much). `dtype`: "auto",
    "bfloat16", "float32" or a torch.dtype, of a folder's matrices and of the cache; auto is float32 on the CPU,
    bfloat16 on a GPU. A folder that cannot fit into memory is a CapacityError before it is read, unless `check_memory`
    is False. `max_num_waiting` and `max_waiting_tokens` bound the queue of an AsyncEngine; `generate` takes any number
    of prompts. `check_values`: as of `dsv4.load`. `expert_memory`: most bytes of routed experts in memory
    (`dsv4.checkpoint.expert_memory.limit_experts`); a model object keeps the limit.

    Prompts begin at the longest prefix that earlier requests have left (`cached_tokens` of an output), with the bits of
    a computation from the start; `enable_prefix_caching=False` keeps none. `cache_dir` keeps prefixes over restarts and
    for other processes; `cache_window` says with which states, `cache_bytes` bounds the folder. Prefixes are written in
    the background: `flush` waits for that, as do `close` and the end of the process.

    `speculate`: tokens that the MTP block may draft per step; tokens and log-probabilities stay the same.
    `enable_return_routed_experts`, `enable_return_indexer_topk`: outputs of `generate` have what each token's forward
    chose (`RequestOutput`).
    """

    @takes_options(EngineConfig)
    def __init__(
        self,
        model: str | Path | EngineModel | None = None,
        *,
        folder: str | Path | None = None,
        engine_config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        check_keywords("LLM", options, EngineConfig)
        self.engine_config = config = dataclasses.replace(engine_config or EngineConfig(), **options)
        check_device(config.device)
        if config.cache_dir is not None:
            _make_cache_folder(config.cache_dir)  # before the model is loaded, which may take minutes
        self._loaded_from: Path | None = None  # where the weights are what the files say
        if model is None or isinstance(model, (str, Path)):
            folder = resolve_model(model, config.revision)
            model = load(folder, config)
            self._loaded_from = Path(folder)
        elif config.revision is not None:
            raise ValueError(f"revision is {config.revision!r}, but the model is an object; allowed: owner/name")
        if isinstance(model, Transformer) and not model.frozen:
            model.freeze()
        self.expert_memory = limit_expert_memory(model, config.expert_memory)  # its `stats()` count reads and hits
        self.path: Path | None = None if folder is None else Path(folder)
        self.config = model.config
        self.tokenizer = tokenizer = _find_tokenizer(self.path)
        self.prompts: PromptEncoder | None = None
        if self.path is not None and tokenizer is not None:
            self.prompts = PromptEncoder(tokenizer, effort_ladder(self.path))
        room = cache_room(model, config) if isinstance(model, Transformer) else None
        self.cache_size = size = cache_size(self.config, config, room)
        self.max_model_len = size.max_model_len
        cache = _new_cache(model, config, size)
        speculator = _new_speculator(model, cache, config)  # first: what rows hold is part of the disk cache's keys
        self.disk_cache = self._open_disk_cache(model, cache)
        disk = None
        if self.disk_cache is not None:
            policy = WindowPolicy.parse(config.cache_window)
            disk = DiskPrefixes(self.disk_cache, policy, config.max_num_seqs)
        manager = CacheManager(cache, config.max_num_seqs, config, disk)
        if speculator is not None:
            manager.before_snapshot = speculator.before_snapshot
        scheduler = Scheduler(config, manager)
        recorder = manager.recorder = new_recorder(model, config)
        runner = ModelRunner(model, cache, torch.device(config.device), speculator is not None, recorder)
        limits = CoreLimits(
            self.config.vocab_size,
            self.config.eos_token_ids,
            self.max_model_len,
            text_vocab_size=0 if tokenizer is None else tokenizer.vocab_size,
            new_decoder=None if tokenizer is None else tokenizer.decode_stream,
            grammars=None
            if tokenizer is None
            else GrammarCompiler(tokenizer, self.config.vocab_size, self.config.eos_token_ids),
            num_pages=size.num_pages if size.by_pages else None,
        )
        files = mapped_files(model)
        self.core = EngineCore(runner, scheduler, limits, None if files is None else files.change, speculator)
        for source in _further_metrics(model, self.disk_cache, self.expert_memory):
            self.core.metrics.add(source)
        self._in_use = threading.Lock()  # the core serves one caller at a time
        self._model, self._backend = model, _backend_of(model)

    @property
    def name(self) -> str:
        """Name of the model for clients: its repository's or folder's, "dsv4-" before the embedded model's."""
        if self.path is None:
            return "dsv4"
        name = model_name(self.path)
        return f"dsv4-{name}" if name == "nano" else name

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs are in the prompts' order, `output.outputs` has all n of a prompt.

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
        groups = [
            self.core.new_requests(self.encode(prompt, f"prompt {place}"), param)
            for place, (prompt, param) in enumerate(zip(batch, params, strict=True))
        ]
        requests = [request for group in groups for request in group]
        self.claim()
        try:
            for request in requests:
                self.core.add(request)
            while self.core.has_work:
                self.core.step()
        finally:  # an error or Ctrl-C leaves nothing behind in the scheduler
            for request in requests:
                self.core.abort(request)
            self.release()
        for first, *others in groups:
            first.output.others = [request.output for request in others]
        return [group[0].output for group in groups]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TokenEvent, None, None]:
        """Completes one prompt and yields its tokens as they come; closing the generator stops the request."""
        request = self.core.new_request(self.encode(prompt), params or SamplingParams())
        self.claim()
        try:
            self.core.add(request)
            while not request.finished:
                for _, event in self.core.step():
                    yield event
        finally:
            self.core.abort(request)
            self.release()

    def claim(self) -> None:
        """Makes the caller the engine's only user; RuntimeError when it has one."""
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "this LLM is busy: a generate or stream call, or an AsyncEngine, is using it;"
                " for many requests at a time use AsyncEngine"
            )
        backend = _backend_of(self._model)
        if backend is None or backend is not self._backend:  # frozen anew, or not frozen: its weights may be others
            self._backend = backend
            self._forget_prefixes()

    def release(self) -> None:
        self._in_use.release()

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes in memory, and those on disk if the weights are others now: for whoever has written into
        the weights of a frozen model. RuntimeError as `claim`."""
        self.claim()
        self._forget_prefixes()
        self.release()

    def flush(self) -> None:
        """Waits until the prefixes that were stored are in `cache_dir`."""
        if self.disk_cache is not None:
            self.disk_cache.flush()

    def close(self) -> None:
        """As `flush`; nothing is stored in `cache_dir` after that."""
        if self.disk_cache is not None:
            self.disk_cache.close()

    def _open_disk_cache(self, model: EngineModel, cache: EngineCache) -> DiskCache | None:
        config = self.engine_config
        if config.cache_dir is None:
            return None
        if not isinstance(model, Transformer) or not isinstance(cache, Cache):
            raise ValueError(f"cache_dir is {str(config.cache_dir)!r}; {type(model).__name__} has no state to store")
        least = least_bytes(cache)
        if config.cache_bytes is not None and config.cache_bytes < least:
            raise ValueError(
                f"cache_bytes is {config.cache_bytes}; allowed: {least} or more bytes, room for the index and a state"
                " of this model with two pages"
            )
        files = None if self._loaded_from is None else sorted(self._loaded_from.glob("*.safetensors"))
        windows = self.config.num_hidden_layers + (config.speculate > 0)  # the MTP block reads streams of the last one
        replay = windows * WINDOW if WindowPolicy.parse(config.cache_window).replays else None
        identity = model_identity(model, cache, files)
        return DiskCache(Path(config.cache_dir), identity, cache, config.cache_bytes, replay)

    def _forget_prefixes(self) -> None:
        self.core.reset_prefix_cache()
        self._loaded_from = None
        if self.disk_cache is not None:
            model, cache = self._model, self.core.runner.cache
            assert isinstance(model, Transformer) and isinstance(cache, Cache)
            self.disk_cache.identity = model_identity(model, cache, None)

    def encode(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """Token ids of a prompt: text after a begin-of-sentence token, ids as they are.

        ValueError, beginning with `name`, for what is neither, an empty text or half a surrogate pair; and, before it
        is tokenized, for a text that cannot fit by its length.
        """
        if not isinstance(prompt, str):
            _check_ids(prompt, name)
            return prompt
        if self.tokenizer is None:
            where = f" {self.path}" if self.path is not None else ""
            raise ValueError(f"the model{where} has no tokenizer, so a prompt must be a list of token ids, not text")
        if not prompt:
            raise ValueError(f"{name} is an empty text; it needs at least 1 character")
        check_text(prompt, name)
        least = 1 + self.tokenizer.min_tokens(prompt)
        if least > self.max_model_len:
            raise ValueError(too_long(self.max_model_len, least, at_least=True))
        return [self.config.bos_token_id, *self.tokenizer.encode(prompt)]


def _make_cache_folder(path: str | Path) -> None:
    try:
        CacheFolder(Path(path)).create()
    except OSError as error:
        raise ValueError(f"cache_dir is {str(path)!r}, which cannot be made or used: {error}") from error


def _new_speculator(model: EngineModel, cache: EngineCache, config: EngineConfig) -> Speculator | None:
    if not config.speculate:
        return None
    if not model.config.num_nextn_predict_layers:
        raise ValueError(
            f"speculate is {config.speculate}, but the model has no MTP block (num_nextn_predict_layers is 0) that"
            " could draft; allowed: 0"
        )
    if not isinstance(model, DraftingModel) or not isinstance(cache, Cache):
        raise ValueError(f"speculate is {config.speculate}; a {type(model).__name__} cannot draft")
    return Speculator(MTPDrafter(model, cache), AdaptiveLength(config.speculate))


def _further_metrics(
    model: EngineModel, disk: DiskCache | None, expert_memory: ExpertMemory | None
) -> Iterator[MetricSource]:
    if disk is not None:
        yield DiskCacheMetrics(disk.stats)
    if expert_memory is not None:
        yield ExpertMemoryMetrics(expert_memory)
    if isinstance(model, Transformer):
        yield ExpertLoadMetrics(model)


def _new_cache(model: EngineModel, config: EngineConfig, size: CacheSize) -> EngineCache:
    if isinstance(model, Transformer):
        return model.new_cache(size.max_num_seqs, size.max_model_len, size.num_pages, config.kv_cache_dtype)
    if config.num_pages is not None:
        raise ValueError(f"num_pages is {config.num_pages}; the cache of a {type(model).__name__} has no pages")
    if config.kv_cache_dtype != "auto":
        raise ValueError(f"kv_cache_dtype is {config.kv_cache_dtype!r}; a {type(model).__name__} has its own cache")
    return model.new_cache(batch_size=size.max_num_seqs, max_tokens=size.max_model_len)


def _backend_of(model: EngineModel) -> object:
    """Changes with the weights of the model; None: they may change at any time."""
    return (model.backend if model.frozen else None) if isinstance(model, Transformer) else model


def _as_batch(prompts: object) -> list[Prompt]:
    """A lone prompt becomes a batch of one. ValueError for what is neither a prompt nor a list."""
    if isinstance(prompts, (str, bytes, bytearray)):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is {prompts!r}; allowed: {_ALLOWED}, or a list of these")
    items = list(cast("Sequence[Prompt]", prompts))
    if items and all(isinstance(item, (int, np.integer)) for item in items):
        return [cast("list[int]", items)]
    return items


def _check_ids(prompt: object, name: str) -> None:
    """ValueError, beginning with `name`, for a prompt that is no list of integers."""
    if isinstance(prompt, (bytes, bytearray)):  # numbers, to Python
        raise ValueError(f"{name} is {type(prompt).__name__}; allowed: {_ALLOWED}")
    if not isinstance(prompt, Sequence):
        raise ValueError(f"{name} is {prompt!r}; allowed: {_ALLOWED}")
    ids = cast("Sequence[object]", prompt)
    # The place is sought only where there is one: few types are looked at, a million tokens are not.
    kinds: set[type[object]] = set(map(type, ids))
    wrong: list[type[object]] = [kind for kind in kinds if kind is bool or not issubclass(kind, (int, np.integer))]
    if wrong:
        place, value = next((place, value) for place, value in enumerate(ids) if type(value) in wrong)
        raise ValueError(f"{name} has {value!r} at position {place}; allowed: token ids (int)")


def _find_tokenizer(path: Path | None) -> Tokenizer | None:
    """The folder's tokenizer; a folder without one is a model for token ids alone."""
    return Tokenizer.from_pretrained(path) if path is not None and (path / "tokenizer.json").is_file() else None
