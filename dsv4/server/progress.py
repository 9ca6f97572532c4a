"""Progress and timings in Chat Completions, on request; field names as in llama.cpp's server.

`return_progress: true` in a streamed request adds chunks without choices before the answer: `prompt_progress` holds the
prefilled part of the prompt, and `queue`, while the request waits, its position. `timings_per_token: true` adds
`timings` and `official_cost`, both so far, to every chunk of the answer: a client that stops it has them. Either option
adds the final ones: in a last chunk without choices, or in a whole answer.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import cast

from dsv4.engine import ProgressEvent, Timings
from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json
from dsv4.usage.prices import OfficialCost


@dataclass(frozen=True)
class Reports:
    """Extra reports that a request asks for."""

    progress: bool = False
    timings_per_token: bool = False

    @property
    def any(self) -> bool:
        return self.progress or self.timings_per_token


def requested_reports(body: bytes) -> Reports:
    """Reads the switches of an otherwise valid request. Raises RequestError for a switch that is no boolean."""
    if b"return_progress" not in body and b"timings_per_token" not in body:
        return Reports()  # most requests: saves parsing a long body again
    request = cast(Json, json.loads(body))
    return Reports(_switch(request, "return_progress"), _switch(request, "timings_per_token"))


def _switch(request: Json, name: str) -> bool:
    value: object = request.get(name)
    if value is None or isinstance(value, bool):
        return value is True
    raise RequestError(
        400,
        f"Failed to deserialize the JSON body into the target type: {name}: {json.dumps(value)[:100]} is no boolean;"
        " allowed: true, false or null",
        param=name,
    )


def progress_chunk(answer_id: str, model: str, event: ProgressEvent) -> str:
    """A chunk without choices that holds the request's queue position and prefill progress."""
    report: Json = {
        "prompt_progress": {
            "total": event.num_prompt_tokens,
            "cache": event.num_cached_tokens,
            "processed": event.num_computed_tokens,
            "time_ms": _milliseconds(event.prefill_seconds),
        }
    }
    if event.queue_position is not None:
        report["queue"] = {"position": event.queue_position, "time_ms": _milliseconds(event.queue_seconds)}
    return _chunk(answer_id, model, report)


def final_chunk(answer_id: str, model: str, timings: Timings, cost: OfficialCost | None) -> str:
    """A chunk without choices that holds the timings and the cost."""
    return _chunk(answer_id, model, _final(timings, cost))


def with_report(object_json: str, timings: Timings | None, cost: OfficialCost | None) -> str:
    """Adds the fields of `final_chunk` to a JSON object; without timings it stays unchanged."""
    if timings is None:
        return object_json
    return f"{object_json[:-1]},{json.dumps(_final(timings, cost), separators=(',', ':'))[1:]}"


def _final(timings: Timings, cost: OfficialCost | None) -> Json:
    report: Json = {"timings": _timings(timings)}
    if cost is not None:
        report["official_cost"] = {"model": cost.model, "usd": round(cost.usd, 9)}
    return report


def _chunk(answer_id: str, model: str, report: Json) -> str:
    head = {"id": answer_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return json.dumps(head | {"choices": [], "usage": None} | report, separators=(",", ":"))


def _timings(timings: Timings) -> Json:
    """Timings in llama.cpp's shape; a rate is null without tokens to measure: no prefilled or no second token."""
    computed = timings.num_prompt_tokens - timings.num_cached_tokens
    written = timings.num_output_tokens
    drafts = {"draft_n": timings.num_draft_tokens, "draft_n_accepted": timings.num_accepted_tokens}
    return {
        "cache_n": timings.num_cached_tokens,
        "prompt_n": computed,
        "prompt_ms": _milliseconds(timings.prefill_seconds),
        "prompt_per_second": _rate(computed, timings.prefill_seconds),
        "predicted_n": written,
        "predicted_ms": _milliseconds(timings.decode_seconds),
        # The first token belongs to the prefill: decode_seconds covers the tokens after it.
        "predicted_per_second": _rate(written - 1, timings.decode_seconds),
        "queue_ms": _milliseconds(timings.queue_seconds),
        **(drafts if timings.num_draft_tokens else {}),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 3) if tokens > 0 and seconds > 0 else None
