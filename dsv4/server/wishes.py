"""Request parameters that deepseek-recipe does not read ("wishes"): honored if the engine can, refused otherwise.

A parameter that is silently ignored would look honored to the client. `foreign_fields.py` has the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters that deepseek-recipe does not read, as in SamplingParams."""

    top_k: int = 0
    min_p: float = 0.0
    ignore_eos: bool = False
    seed: int | None = None  # where deepseek-recipe does not read it

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
        seed = request.get("seed")  # checked where it counts
        return cls(max(top_k, 0), float(min_p), bool(ignore_eos), seed if isinstance(seed, int) else None)


_MAX_SHOWN = 300  # characters of a wrong value in its refusal
# llama.cpp's samplers and switches -> the values that change nothing.
_LLAMA_NEUTRAL: dict[str, tuple[object, ...]] = {
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "typ_p": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "adaptive_target": (-1,),
    "smoothing_factor": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "n_predict": (-1,),
    "n_keep": (0,),
    "n_probs": (0,),
    "n_indent": (0,),
    "min_keep": (0, 1),
    "t_max_predict_ms": (-1, 0),
}


def refuse_sampling(request: Json) -> None:
    """RequestError 400 for a sampler of other servers that this one does not have, unless its value is neutral.

    Their further settings (`mirostat_tau`, `dry_base`, `xtc_threshold`) do nothing without it, nor do they here.
    """
    for name, neutral in _LLAMA_NEUTRAL.items():
        value = request.get(name)
        if value is not None and (isinstance(value, bool) or value not in neutral):
            raise invalid(name, value, f"{neutral[0]}, which changes nothing; it is not implemented")
    for name in ("samplers", "lora", "grammar_lazy"):
        if request.get(name):
            raise unavailable(name, "this server has no such setting")


def refuse_wishes(request: Json, wishes: Mapping[str, str]) -> None:
    """RequestError 400 for the first of `wishes` (field -> reason of the refusal) with a truthy value.

    null, false, 0 and empty values ask for nothing, nor does the form {"type": "text"}.
    """
    for name, reason in wishes.items():
        if request.get(name) and request[name] != {"type": "text"}:
            raise unavailable(name, reason)


def unavailable(name: str, reason: str) -> RequestError:
    return RequestError(400, f"{name} is unavailable: {reason}. Send the request without it", param=name)


def invalid(name: str, value: object, allowed: str) -> RequestError:
    shown = repr(value if not isinstance(value, float) or math.isfinite(value) else str(value))
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
    return RequestError(400, f"Invalid {name} value {shown}; allowed: {allowed}", param=name)
