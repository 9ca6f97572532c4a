"""The model of an engine process, as the server knows it: its facts, and a tokenizer of the server's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.config import ModelConfig
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder, effort_ladder


@dataclass(frozen=True)
class ModelFacts:
    """Description of the model that the process has loaded."""

    name: str
    path: Path | None
    config: dict[str, Any]
    max_model_len: int
    description: tuple[str, ...]  # lines for whoever starts the server

    @classmethod
    def of(cls, llm: Any) -> ModelFacts:
        """Facts of an LLM."""
        return cls(llm.name, llm.path, llm.config.to_dict(), llm.max_model_len, tuple(describe(llm)))


class ServedModel:
    """A `TextModel` of facts."""

    def __init__(self, facts: ModelFacts) -> None:
        self.facts = facts
        self.name, self.path, self.max_model_len = facts.name, facts.path, facts.max_model_len
        self.config = ModelConfig.from_dict(facts.config)
        self.tokenizer: Tokenizer | None = None
        self.prompts: PromptEncoder | None = None
        if self.path is not None and (self.path / "tokenizer.json").is_file():
            self.tokenizer = Tokenizer.from_pretrained(self.path)
            self.prompts = PromptEncoder(self.tokenizer, effort_ladder(self.path))


def describe(llm: Any) -> list[str]:
    """Lines about a loaded LLM: the size of the cache, the kernels if they are native, the limit of experts if any."""
    from dsv4.kernels import backends

    lines = [str(llm.cache_size)]
    if backends.name() == "native":
        lines.append(backends.describe())
    if llm.expert_memory is not None:
        lines.append(llm.expert_memory.describe())
    return lines
