"""A server for clients of the outside: a scripted model with a long context, and a script that fits its prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv4.engine import LLM
from dsv4.tokenizer import Tokenizer
from tests.server.conftest import Served, serving
from tests.server.responses_api import markup
from tests.server.scripted_model import ScriptedModel

CONTEXT = 1 << 20
"""Tokens of context: an agent's first prompt has more than 100,000 in the tests' small vocabulary."""


class Script:
    """Replies by what a prompt has in it: that of the first rule whose words it has, else "ok"."""

    def __init__(self, model: ScriptedModel, rules: Mapping[str, str]) -> None:
        self._decode = Tokenizer.from_pretrained(model.folder).decode
        self._rules = rules
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, prompt_ids: list[int]) -> str:
        """Called at every token: each prompt is read once."""
        key = tuple(prompt_ids)
        if key not in self._known:
            prompt = self._decode(prompt_ids)
            found = (reply for words, reply in self._rules.items() if words in prompt)
            self._known[key] = next(found, "</think>ok")
        return self._known[key]


class OfferedCall:
    """A call of the last tool that a prompt offers, after some thinking."""

    def __init__(self, model: ScriptedModel, **arguments: str) -> None:
        self._decode = Tokenizer.from_pretrained(model.folder).decode
        self._arguments = arguments
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, prompt_ids: list[int]) -> str:
        key = tuple(prompt_ids)
        if key not in self._known:
            offered = re.findall(r'^{"name": "([^"]+)"', self._decode(prompt_ids), flags=re.MULTILINE)
            self._known[key] = "I think.</think>\n\n" + markup(offered[-1], **self._arguments)
        return self._known[key]


class RequestCount(logging.Handler):
    """Requests that the server has answered: method, path, status."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = record.__dict__["fields"]
        self.seen.append((fields["method"], fields["path"], fields["status"]))

    def posts(self, status: int) -> int:
        return sum(method == "POST" and given == status for method, _, given in self.seen)


@contextlib.contextmanager
def counted_requests() -> Iterator[RequestCount]:
    log = logging.getLogger("dsv4.requests")
    counter, level = RequestCount(), log.level
    log.addHandler(counter)
    log.setLevel(logging.INFO)
    try:
        yield counter
    finally:
        log.setLevel(level)
        log.removeHandler(counter)


@contextlib.contextmanager
def long_server(folder: Path, max_model_len: int = CONTEXT, **options: object) -> Iterator[Served]:
    """Server over a ScriptedModel with `max_model_len` tokens of context; `options` of `serving`."""
    model = ScriptedModel(folder)
    model.config = dataclasses.replace(model.config, max_position_embeddings=CONTEXT)
    with serving(LLM(model, folder=folder, max_model_len=max_model_len), model, **options) as served:
        yield served
