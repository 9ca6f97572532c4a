"""vLLM's switches of thinking and effort, in every format: `chat_template_kwargs`, and `enable_thinking` beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid

_FIELD = "chat_template_kwargs"


@dataclass(frozen=True)
class TemplateOptions:
    """What the switches of a request say; None where they say nothing."""

    thinking: bool | None = None
    effort: str | None = None


def template_options(request: Json) -> TemplateOptions:
    """Reads the switches: `thinking` or `enable_thinking`, and `reasoning_effort`. Other arguments have no effect.

    RequestError 400, with its place, for a value of the wrong kind.
    """
    template = request.get(_FIELD)
    if not isinstance(template, (dict, type(None))):
        raise invalid(_FIELD, cast(object, template), 'an object, like {"thinking": false}')
    options = cast(Json, template or {})
    switches = [(f"{_FIELD}.{name}", options.get(name)) for name in ("thinking", "enable_thinking")]
    switches.append(("enable_thinking", request.get("enable_thinking")))
    for place, value in switches:
        if not isinstance(value, (bool, type(None))):
            raise invalid(place, value, "true and false")
    effort = options.get("reasoning_effort")
    if not isinstance(effort, (str, type(None))):
        raise invalid(f"{_FIELD}.reasoning_effort", effort, "a text")
    return TemplateOptions(next((value for _, value in switches if isinstance(value, bool)), None), effort)
