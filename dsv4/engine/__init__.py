"""The engine: scheduler, runner, sampler, and the two ways in, `LLM` (synchronous) and `AsyncEngine`.

Cheap to import, as `dsv4` is: the command line reads `config.py` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4.lazy import lazy_names

if TYPE_CHECKING:
    from dsv4.engine.async_engine import AsyncEngine
    from dsv4.engine.capacity import CapacityError
    from dsv4.engine.errors import EngineError, QueueFullError
    from dsv4.engine.llm import LLM
    from dsv4.engine.outputs import ProgressEvent, RequestOutput, Timings, TokenEvent
    from dsv4.engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "CapacityError",
    "EngineError",
    "ProgressEvent",
    "QueueFullError",
    "RequestOutput",
    "SamplingParams",
    "Timings",
    "TokenEvent",
]

# Public name -> (module, name there).
_LAZY = {
    "AsyncEngine": ("dsv4.engine.async_engine", "AsyncEngine"),
    "CapacityError": ("dsv4.engine.capacity", "CapacityError"),
    "EngineError": ("dsv4.engine.errors", "EngineError"),
    "LLM": ("dsv4.engine.llm", "LLM"),
    "ProgressEvent": ("dsv4.engine.outputs", "ProgressEvent"),
    "QueueFullError": ("dsv4.engine.errors", "QueueFullError"),
    "RequestOutput": ("dsv4.engine.outputs", "RequestOutput"),
    "SamplingParams": ("dsv4.engine.sampling_params", "SamplingParams"),
    "Timings": ("dsv4.engine.outputs", "Timings"),
    "TokenEvent": ("dsv4.engine.outputs", "TokenEvent"),
}

__getattr__, __dir__ = lazy_names("dsv4.engine", _LAZY)
