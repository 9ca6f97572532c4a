"""Errors of the engine. No torch: servers whose engine runs in another process know them too."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine cannot go on: every request that it has gets this, and from an AsyncEngine every new one too."""


class EngineCrashedError(EngineError):
    """The engine process has crashed and is being started again: a later try may succeed."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds, for clients


class QueueFullError(RuntimeError):
    """The queue is full: the request is refused, a later try may succeed."""

    retry_after = 5.0  # seconds, for clients


class QueueTimeoutError(EngineError):
    """The request has waited too long without being begun: it is given up, a later try may succeed."""

    retry_after = 5.0  # seconds, for clients


class PromptRefusedError(ValueError):
    """A prompt that is not computed, because it has crashed the engine before: no later try will succeed."""


def too_long(max_model_len: int, num_prompt_tokens: int, max_tokens: int = 0, *, at_least: bool = False) -> str:
    """Message about a prompt that does not fit, in the hosted service's words, which clients read.

    `at_least`: the prompt's number of tokens is a lower bound.
    """
    requested = f"{'at least ' if at_least else ''}{num_prompt_tokens + max_tokens}"
    return (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {requested} tokens"
        f" ({num_prompt_tokens} in the prompt, {max_tokens} in the completion). Please reduce the length of the prompt"
        " or completion."
    )


class GrammarError(ValueError):
    """A constraint that cannot be followed: the field of SamplingParams, and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"SamplingParams.{field} cannot be compiled: {reason}")
        self.field = field
        self.reason = reason
