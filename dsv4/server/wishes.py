"""Request parameters that deepseek-recipe does not read ("wishes"): honored if the engine can, refused otherwise.

A parameter that is silently ignored would look honored to the client. Each format has its own table of unsupported
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json

NO_GRAMMAR = "ask for JSON of a schema or a regex with `response_format`"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters that deepseek-recipe does not read, as in SamplingParams."""

    top_k: int = 0
    min_p: float = 0.0
    ignore_eos: bool = False

    @classmethod
    def of(cls, request: Json) -> Sampling:
        """The parameters of a request; a top_k of -1 means no limit, as 0. RequestError 400 names the range."""
        top_k, min_p, ignore_eos = request.get("top_k"), request.get("min_p"), request.get("ignore_eos")
        if top_k is None:
            top_k = 0
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < -1:
            raise invalid("top_k", top_k, "integers of 1 or more, and 0 or -1 for no limit")
        if min_p is None:
            min_p = 0.0
        if isinstance(min_p, bool) or not isinstance(min_p, (int, float)) or not 0.0 <= min_p <= 1.0:
            raise invalid("min_p", min_p, "[0, 1]")
        if not isinstance(ignore_eos, (bool, type(None))):
            raise invalid("ignore_eos", ignore_eos, "true and false")
        return cls(max(top_k, 0), float(min_p), bool(ignore_eos))


def refuse_wishes(request: Json, wishes: Mapping[str, str]) -> None:
    """RequestError 400 for the first of `wishes` (field -> reason of the refusal) with a truthy value.

    null, false, 0 and empty values ask for nothing.
    """
    for name, reason in wishes.items():
        if request.get(name):
            raise unavailable(name, reason)


def unavailable(name: str, reason: str) -> RequestError:
    return RequestError(400, f"{name} is unavailable: {reason}. Send the request without it", param=name)


def invalid(name: str, value: object, allowed: str) -> RequestError:
    shown = value if not isinstance(value, float) or math.isfinite(value) else str(value)
    return RequestError(400, f"Invalid {name} value {shown!r}; allowed: {allowed}", param=name)
