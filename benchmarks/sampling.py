"""`dsv4 bench sampling`: time of one draw, and of a decode step of the embedded model with and without a constraint.

Draws: rows of normal logits of nano's and DeepSeek-V4-Flash's vocabulary, by the filters that a request may set.
Steps: a request with temperature 1, free and under a JSON schema, in turns; a round has the median of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.harness.turns import in_turns, line
from dsv4.commands.options import count

NANO_VOCAB, FLASH_VOCAB = 8192, 129_280
SPREAD = 3.0  # standard deviation of the logits
FILTERS = {
    "": (0, 1.0, 0.0),
    ", top_p 0.95": (0, 0.95, 0.0),
    ", min_p 0.05": (0, 1.0, 0.05),
    ", top_k 50": (50, 1.0, 0.0),
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = "The people are "


def draws(vocab: int, filters: tuple[int, float, float]) -> Callable[[int], float]:
    """Takes the mean time of some draws from one row, in microseconds."""
    import torch

    from dsv4.kernels.sampling import draw_token

    row = SPREAD * torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    count = 1_000_000 // vocab + 3

    def take(number: int) -> float:
        begin = time.perf_counter()
        for key in range(count):
            draw_token(row, 1.0, *filters, key + number * count)
        return (time.perf_counter() - begin) / count * 1e6

    return take


def step(llm: Any, constraint: dict[str, Any], tokens: int, seed: int) -> float:
    """Median time of the decode steps of one request, in microseconds."""
    from dsv4 import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed, **constraint)
    request = llm.core.new_request(llm.encode(PROMPT), params)
    llm.core.add(request)
    times: list[float] = []
    while not request.finished:
        decodes = bool(request.output.token_ids)
        begin = time.perf_counter()
        llm.core.step()
        if decodes:
            times.append(time.perf_counter() - begin)
    llm.reset_prefix_cache()
    assert len(times) == tokens - 1, f"the output ended after {len(times) + 1} tokens; expected {tokens}"
    return statistics.median(times) * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench sampling", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--rounds", type=count, default=15, metavar="N", help="default: %(default)s")
    add("--tokens", type=count, default=200, help="of each request (default: %(default)s)")
    add("--threads", type=count, default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    import torch

    from dsv4 import LLM

    torch.set_num_threads(options.threads)
    takes = {
        f"a draw from {vocab} tokens{name}": draws(vocab, filters)
        for vocab in (NANO_VOCAB, FLASH_VOCAB)
        for name, filters in FILTERS.items()
    }
    llm = LLM(max_model_len=options.tokens + 64)
    schema = {"type": "array", "items": PERSON, "minItems": options.tokens}
    takes["a step, free"] = partial(step, llm, {}, options.tokens)
    takes["a step under a JSON schema"] = partial(step, llm, {"json_schema": schema}, options.tokens)
    samples = in_turns(takes, options.rounds)
    for name, values in samples.items():
        print(line(name, values, "us"))
    free, masked = list(samples.values())[-2:]
    print(line("longer under the schema", [100 * (b / a - 1) for a, b in zip(free, masked, strict=True)], "%"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
