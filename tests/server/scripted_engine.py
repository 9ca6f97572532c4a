"""LLMs for engine processes: functions of a module that the process can import."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from dsv4.engine import LLM, SamplingParams, async_engine
from dsv4.engine.constraint import Constraint
from dsv4.engine.grammar import GrammarCompiler
from dsv4.model.batch import RaggedBatch
from dsv4.model.token_trace import TokenTrace

from .scripted_model import ScriptedCache, ScriptedModel


def scripted_llm(folder: Path, fields: dict[str, object], **options: object) -> LLM:
    """LLM over a ScriptedModel with these fields."""
    model = ScriptedModel(folder)
    for name, value in fields.items():
        setattr(model, name, value)
    return LLM(model, folder=folder, **options)


def dies_of(folder: Path, fatal: list[int], fields: dict[str, object], **options: object) -> LLM:
    """As `scripted_llm`, but killed by SIGSEGV as soon as a sequence has the tokens `fatal`, read or written."""
    llm = scripted_llm(folder, fields, **options)
    model = llm.core.runner.model
    compute = model.next_token_logits

    def compute_or_die(batch: RaggedBatch, cache: ScriptedCache, rows: np.ndarray) -> Tensor:
        logits = compute(batch, cache, rows)
        for history in cache.histories:
            if any(history[i : i + len(fatal)] == fatal for i in range(len(history))):
                signal.raise_signal(signal.SIGSEGV)  # in this thread: another would die after a step or two more
        return logits

    model.next_token_logits = compute_or_die
    return llm


def loads_once(folder: Path, mark: Path, fields: dict[str, object]) -> LLM:
    """As `scripted_llm`, but fails from the second time on."""
    if mark.exists():
        raise ValueError("the disk is gone")
    mark.touch()
    return scripted_llm(folder, fields)


def slow_at_first(folder: Path, mark: Path, seconds: float) -> LLM:
    """As `scripted_llm`, but in the first process a prompt takes so long."""
    is_first = not mark.exists()
    mark.touch()
    return scripted_llm(folder, {"seconds_of_prefill": seconds if is_first else 0.0})


def slow_to_compile(folder: Path, seconds: float) -> LLM:
    """LLM whose constraints take long to compile."""
    compile_now = GrammarCompiler.compile

    def compile_later(self: GrammarCompiler, params: SamplingParams) -> Constraint:
        time.sleep(seconds)
        return compile_now(self, params)

    GrammarCompiler.compile = compile_later  # the process ends with the engine
    return scripted_llm(folder, {})


class EndlessTracing:
    """Tracing that ends for one token only."""

    def __init__(self, model: object, token_ids: list[int], *_: object) -> None:
        self.ends = len(token_ids) == 1

    def step(self) -> TokenTrace | None:
        time.sleep(0.01)
        return TokenTrace(0, [], [], {}) if self.ends else None


def endless_to_trace(folder: Path) -> LLM:
    async_engine.Tracing = EndlessTracing  # type: ignore[misc,assignment] # the process ends with the engine
    return scripted_llm(folder, {})


def killed_while_it_loads() -> LLM:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def slow_to_load(seconds: float) -> LLM:
    time.sleep(seconds)
    raise AssertionError
