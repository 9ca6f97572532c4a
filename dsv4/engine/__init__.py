"""The engine: scheduler, runner, sampler, and the two ways in, `LLM` (synchronous) and `AsyncEngine`."""

from dsv4.engine.async_engine import AsyncEngine
from dsv4.engine.capacity import CapacityError
from dsv4.engine.core import EngineError
from dsv4.engine.llm import LLM
from dsv4.engine.outputs import ProgressEvent, RequestOutput, Timings, TokenEvent
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.waiting import QueueFullError

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
