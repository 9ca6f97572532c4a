"""Progress and timings in Chat Completions, for clients that ask; the words are those of llama.cpp's server.

`return_progress: true` in a streamed request adds chunks without choices before the answer: `prompt_progress` says how
much of the prompt has been read, and `queue`, while the request waits, how many wait before it. `timings_per_token:
true` puts `timings` into every chunk of the answer. Either adds `timings` to the end: to a last chunk without choices,
or to a whole answer.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import cast

from dsv4.engine import ProgressEvent, Timings
from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json


@dataclass(frozen=True)
class Reports:
    """What a request asks to hear beside its answer."""

    progress: bool = False
    timings_per_token: bool = False

    @property
    def any(self) -> bool:
        return self.progress or self.timings_per_token


def requested_reports(body: bytes) -> Reports:
    """Reads a request that is valid otherwise. Raises RequestError for a switch that is no boolean."""
    if b"return_progress" not in body and b"timings_per_token" not in body:
        return Reports()  # most requests: not worth reading a long body once more
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
    )


def progress_chunk(answer_id: str, model: str, event: ProgressEvent) -> str:
    """A chunk without choices that says where the request is: waiting in the queue, or how far its prompt is read."""
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


def timings_chunk(answer_id: str, model: str, timings: Timings) -> str:
    """A chunk without choices that holds the timings."""
    return _chunk(answer_id, model, {"timings": _timings(timings)})


def with_timings(object_json: str, timings: Timings | None) -> str:
    """A JSON object with `timings` added; unchanged where there are none."""
    if timings is None:
        return object_json
    return f'{object_json[:-1]},"timings":{json.dumps(_timings(timings), separators=(",", ":"))}}}'


def _chunk(answer_id: str, model: str, report: Json) -> str:
    head = {"id": answer_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return json.dumps(head | {"choices": [], "usage": None} | report, separators=(",", ":"))


def _timings(timings: Timings) -> Json:
    """A rate is null where there is nothing to divide by: no prompt token computed, no second token yet."""
    computed = timings.num_prompt_tokens - timings.num_cached_tokens
    written = timings.num_output_tokens
    return {
        "cache_n": timings.num_cached_tokens,
        "prompt_n": computed,
        "prompt_ms": _milliseconds(timings.prefill_seconds),
        "prompt_per_second": _rate(computed, timings.prefill_seconds),
        "predicted_n": written,
        "predicted_ms": _milliseconds(timings.decode_seconds),
        # The first token belongs to the prompt's time: the others are what the time after it went into.
        "predicted_per_second": _rate(written - 1, timings.decode_seconds),
        "queue_ms": _milliseconds(timings.queue_seconds),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 3) if tokens > 0 and seconds > 0 else None
