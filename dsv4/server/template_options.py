"""Switches of thinking and effort in spellings other than a format's own: of other APIs, and of vLLM's templates."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid

_TEMPLATE = "chat_template_kwargs"
_KINDS = {"enabled": True, "adaptive": True, "disabled": False}


@dataclass(frozen=True)
class TemplateOptions:
    """Values of a request's switches; None where they say nothing."""

    thinking: bool | None = None
    effort: str | None = None


def template_options(request: Json, own: Collection[str] = ()) -> TemplateOptions:
    """Reads the switches: `thinking` of DeepSeek's and Anthropic's APIs, `reasoning_effort`, `reasoning.effort` and
    `reasoning.enabled`, `output_config.effort`, `enable_thinking`, and `chat_template_kwargs` with `thinking`,
    `enable_thinking` and `reasoning_effort`; other arguments of that have no effect.

    `own`: fields that the format reads itself. RequestError 400, with its place, for a value of the wrong kind.
    """
    template = request.get(_TEMPLATE)
    if not isinstance(template, (dict, type(None))):
        raise invalid(_TEMPLATE, cast(object, template), 'an object, like {"thinking": false}')
    options = cast(Json, template or {})
    foreign: Json = {name: value for name, value in request.items() if name not in own}
    reasoning, output = _object(foreign, "reasoning"), _object(foreign, "output_config")
    switches = {f"{_TEMPLATE}.{name}": options.get(name) for name in ("thinking", "enable_thinking")}
    given: object = request.get("reasoning")  # no API's own has `enabled`
    enabled = cast(Json, given).get("enabled") if isinstance(given, dict) else None
    switches |= {"enable_thinking": request.get("enable_thinking"), "reasoning.enabled": enabled}
    efforts = {
        f"{_TEMPLATE}.reasoning_effort": options.get("reasoning_effort"),
        "reasoning_effort": foreign.get("reasoning_effort"),
        "reasoning.effort": reasoning.get("effort"),
        "output_config.effort": output.get("effort"),
    }
    for place, value in switches.items():
        if not isinstance(value, (bool, type(None))):
            raise invalid(place, value, "true and false")
    for place, value in efforts.items():
        if not isinstance(value, (str, type(None))):
            raise invalid(place, value, "a text")
    found = [_kind(foreign.get("thinking")), *switches.values()]
    thinking = next((value for value in found if isinstance(value, bool)), None)
    return TemplateOptions(thinking, next((value for value in efforts.values() if isinstance(value, str)), None))


def _object(request: Json, name: str) -> Json:
    value: object = request.get(name)
    if not isinstance(value, (dict, type(None))):
        raise invalid(name, value, 'an object, like {"effort": "high"}')
    return cast(Json, value or {})


def _kind(value: object) -> bool | None:
    """The switch that {"type": "disabled"} and the like are."""
    if value is None:
        return None
    kind: object = cast(Json, value).get("type") if isinstance(value, dict) else None
    if kind not in _KINDS:
        raise invalid("thinking", cast(object, value), 'an object, {"type": "enabled"} or {"type": "disabled"}')
    return _KINDS[cast(str, kind)]
