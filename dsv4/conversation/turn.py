"""Turn: one request to a model: its input for the engine, and the options to parse its answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import deepseek_recipe as recipe

from dsv4.conversation.tool_arguments import Schema
from dsv4.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Turn:
    """Engine input for one request, and the options to parse the answer."""

    prompt_token_ids: list[int]
    params: SamplingParams
    parsing: recipe.ParsingOptions = field(default_factory=recipe.ParsingOptions)
    # Parameter properties by tool name; empty if no tools are offered.
    tools: dict[str, Schema] = field(default_factory=dict[str, Schema])
    history: bytes = b""  # digest of the conversation's messages
