"""ServedModels: the models of one server, each with its engine, and the names that requests may use for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv4.conversation.model import ConversationModel
from dsv4.conversation.said_turns import SaidTurns
from dsv4.engine.interface import Engine
from dsv4.server.model_names import OFFICIAL_NAMES, RETIRED_NAMES, model_for, shown_name


@dataclass(frozen=True)
class ServedModel:
    """One model: its own name, its engine, and its prompts and answers."""

    name: str
    engine: Engine
    conversation: ConversationModel

    @classmethod
    def of(cls, engine: Engine, said: SaidTurns | None = None) -> ServedModel:
        """The model of an engine. `said`: memory of turns. ValueError for a model without a tokenizer."""
        return cls(engine.llm.name, engine, ConversationModel(engine.llm, said))

    def conversation_of(self, key: str | None, salt: str | None) -> ConversationModel:
        """The conversations of an API key whose prefixes have this salt; nobody else's turns are known to it."""
        return self.conversation.of(json.dumps([self.name, key, salt]))


class ServedModels:
    """At least one model. The first answers where a name does not say which."""

    def __init__(self, models: Sequence[ServedModel], aliases: Sequence[str] = (), retired: bool = False) -> None:
        """`aliases`: further names of the first model. The hosted service's names are distributed by family
        (`model_names.model_for`), with `retired` those that it has retired too. ValueError for two models of one name.
        """
        self._models = tuple(models)
        self._own, self._aliases = [model.name for model in models], tuple(aliases)
        check_names(self._own)
        hosted = (*OFFICIAL_NAMES, *(RETIRED_NAMES if retired else ()))
        self.names = list(dict.fromkeys([*self._own, *aliases, *hosted]))

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def first(self) -> ServedModel:
        return self._models[0]

    def find(self, name: str) -> ServedModel:
        """The model that answers to a name that requests may use."""
        return self._models[model_for(name, self._own, self._aliases)]

    def shown(self, name: str) -> str:
        """Name in the answer to a request for `name`."""
        return shown_name(name, [*self._own, *self._aliases])


def check_names(names: Sequence[str]) -> None:
    """ValueError for a name that two models have: requests could not tell them apart."""
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"two models are named {twice!r}; allowed: folders of different names")
