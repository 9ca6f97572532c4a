"""ChatSession: a conversation with one model without a server, used by the terminal chat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import deepseek_recipe as recipe

from dsv4.conversation.answer import Answer
from dsv4.conversation.model import ConversationModel
from dsv4.conversation.turn import Turn
from dsv4.engine.llm import LLM
from dsv4.text import check_text

Piece = tuple[Literal["thinking", "answer"], str]
_NAME = "model"
_OPTIONS = recipe.ConversionOptions().with_model_versions_by_name({_NAME: recipe.ModelVersion.DeepseekV4Pro})


@dataclass
class ChatSession:
    """History and settings of a conversation; an interrupted reply stays in the history as far as it got."""

    llm: LLM
    thinking: bool = True
    effort: str | None = None
    max_tokens: int = 1024
    temperature: float | None = None  # None: the API's default
    top_p: float = 1.0
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    num_tokens: int = 0  # of the last reply

    def __post_init__(self) -> None:
        self.model = ConversationModel(self.llm)

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Yields the reply's pieces. Closing the generator stops the generation.

        Raises ValueError if the question does not fit the context or is not valid Unicode.
        """
        check_text(text, "the question")
        self.messages.append({"role": "user", "content": text})
        self.num_tokens = 0
        said = ""
        try:
            turn, answer = self._prepare()
            with contextlib.closing(self.llm.stream(turn.prompt_token_ids, turn.params)) as events:
                for event in events:
                    self.num_tokens += len(event.token_ids)
                    for chunk in answer.push(event):
                        for piece in _pieces(chunk.to_json()):
                            said += piece[1] if piece[0] == "answer" else ""
                            yield piece
                    if answer.finished:
                        break
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()  # an unanswered question would be merged with the next one

    def reset(self) -> None:
        self.messages.clear()

    def _prepare(self) -> tuple[Turn, Answer]:
        body: dict[str, Any] = {
            "model": _NAME,
            "messages": self.messages,
            "thinking": {"type": "enabled" if self.thinking else "disabled"},
            "reasoning_effort": self.effort,
            "max_tokens": self.max_tokens,
        }
        try:
            request = recipe.ChatCompletionRequest(json.dumps(body)).convert(_OPTIONS)
            turn = self.model.prepare(request)
        except recipe.ConversionError as error:
            raise ValueError(str(error)) from error
        # The API fixes temperature and top_p in thinking mode; the terminal's user may set them.
        chosen: dict[str, Any] = {"top_p": self.top_p, "seed": self.seed}
        if self.temperature is not None:
            chosen["temperature"] = self.temperature
        turn = dataclasses.replace(turn, params=dataclasses.replace(turn.params, **chosen))
        generator = recipe.ChatCompletionRequest.chunk_generator(request, "terminal", _NAME)
        return turn, self.model.answer(turn, generator)


def _pieces(chunk: str) -> Generator[Piece, None, None]:
    for choice in json.loads(chunk)["choices"]:
        delta = choice["delta"]
        if delta.get("reasoning_content"):
            yield "thinking", delta["reasoning_content"]
        if delta.get("content"):
            yield "answer", delta["content"]
