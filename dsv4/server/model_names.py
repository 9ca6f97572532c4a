"""Model names that requests may use: those of the served models, the hosted service's ids, and aliases of these."""

from __future__ import annotations

from collections.abc import Sequence

import deepseek_recipe as recipe

from dsv4.server.errors import RequestError

# The hosted service's ids for V4: clients configured for it work unchanged.
OFFICIAL_NAMES = ("deepseek-flash", "deepseek-v4-pro", "deepseek-v4-flash")
# Ids that the hosted service retired -> True if they think where the request does not say so.
RETIRED_NAMES = {"deepseek-chat": False, "deepseek-reasoner": True}
RETIRED_AT = "2026-07-24 15:59 UTC"
VERSION = recipe.ModelVersion.DeepseekV4Pro
_FLASH = "deepseek-v4-flash"  # it and its dated ids are answered as deepseek-flash
_LONG_CONTEXT = "[1m]"


def conversion_options(names: Sequence[str]) -> recipe.ConversionOptions:
    """deepseek-recipe's options for models of these names, which think unless a request says otherwise."""
    return recipe.ConversionOptions(
        default_thinking_mode=True,
        messages_web_search=recipe.WebSearchBehavior.Drop,
    ).with_model_versions_by_name(dict.fromkeys(names, VERSION))


def without_context_suffix(name: str) -> str:
    """The name without "[1m]", Claude Code's request for the long context: the context is always whole."""
    return name.removesuffix(_LONG_CONTEXT)


def is_claude(name: str) -> bool:
    return name.startswith("claude-")


def options_for(name: str, options: recipe.ConversionOptions, *, claude: bool = False) -> recipe.ConversionOptions:
    """Options for a request that names this model. `claude`: Anthropic's names are accepted too.

    RequestError 400, with the date, for a retired name that the options do not have.
    """
    known = options.model_versions_by_name
    if name in RETIRED_NAMES:
        if name not in known:
            raise RequestError(400, _retired(name, list(known)), param="model")
        return options.with_default_thinking_mode(RETIRED_NAMES[name])
    if (claude and is_claude(name)) or _is_flash(name):
        return options.with_model_alias(name, VERSION)
    return options


def check_name(name: str, options: recipe.ConversionOptions, *, claude: bool = False) -> None:
    """RequestError 400 for a name that is no model's; the message lists the names. `claude`: as of `options_for`."""
    known = options_for(name, options, claude=claude).model_versions_by_name
    if name not in known:
        message = f"The supported API model names are {', '.join(sorted(known))}, but you passed {name}."
        raise RequestError(400, message, param="model")


def shown_name(name: str, own_names: Sequence[str]) -> str:
    """Name in the answer to a request for `name`: the hosted service shows one id for all of Flash's."""
    return "deepseek-flash" if name not in own_names and _is_flash(name) else name


def model_for(name: str, own_names: Sequence[str], aliases: Sequence[str] = ()) -> int:
    """Index of the served model that answers to a name. `aliases`: further names of the first.

    A hosted or claude-* name that is not a model's own belongs to a family, Pro (claude-opus-* too) or Flash: the first
    model whose own name has the family's word in it answers, else the first of all, as for any other name.
    """
    if name in own_names:
        return own_names.index(name)
    if name in aliases or not name.startswith(("deepseek-", "claude-")):
        return 0
    family = "pro" if "pro" in name.split("-") or name.startswith("claude-opus") else "flash"
    return next((i for i, own in enumerate(own_names) if family in own.lower()), 0)


def _is_flash(name: str) -> bool:
    return name == _FLASH or name.startswith(_FLASH + "-")


def _retired(name: str, known: Sequence[str]) -> str:
    return (
        f"The model {name} was retired on {RETIRED_AT}. The supported API model names are {', '.join(sorted(known))},"
        f" but you passed {name}."
    )
