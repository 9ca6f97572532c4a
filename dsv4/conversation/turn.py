"""Turn: one request to a model, as the engine takes it and as its answer is parsed."""

from __future__ import annotations

from dataclasses import dataclass

import deepseek_recipe as recipe

from dsv4.conversation.tool_arguments import Schema
from dsv4.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Turn:
    """What the engine needs to answer one request, and how to parse the answer."""

    prompt_token_ids: list[int]
    params: SamplingParams
    parsing: recipe.ParsingOptions
    tools: dict[str, Schema]  # properties of the parameters by name; empty where no tools are offered
