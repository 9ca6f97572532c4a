"""The engine: scheduler, runner, sampler, and the two ways in, `LLM` (synchronous) and `AsyncEngine`."""

from dsv4.engine.async_engine import AsyncEngine
from dsv4.engine.core import EngineError
from dsv4.engine.llm import LLM
from dsv4.engine.outputs import RequestOutput, TokenEvent
from dsv4.engine.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncEngine", "EngineError", "RequestOutput", "SamplingParams", "TokenEvent"]
