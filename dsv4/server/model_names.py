"""Model names that requests may use."""

from __future__ import annotations

from collections.abc import Sequence

import deepseek_recipe as recipe

# The hosted service's names for V4: clients configured for it work unchanged.
OFFICIAL_NAMES = ("deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash")
VERSION = recipe.ModelVersion.DeepseekV4Pro


def conversion_options(names: Sequence[str], thinking: bool) -> recipe.ConversionOptions:
    """deepseek-recipe's options for a model of these names. `thinking`: the default if a request does not set it."""
    return recipe.ConversionOptions(
        default_thinking_mode=thinking,
        messages_web_search=recipe.WebSearchBehavior.Drop,
    ).with_model_versions_by_name(dict.fromkeys(names, VERSION))
