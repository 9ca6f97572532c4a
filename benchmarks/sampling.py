"""`dsv4 bench sampling`: time of one draw, and of a decode step of the embedded model with and without a constraint.

Draws: rows of normal logits of nano's and DeepSeek-V4-Flash's vocabulary, by the filters that a request may set.
Steps: one request with temperature 1, free and under a JSON schema, in turns; medians over the steps of each round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.harness.turns import at_least_one, in_turns, line

NANO_VOCAB, FLASH_VOCAB = 1280, 129_280
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


def decode(llm: Any, constraint: dict[str, Any], tokens: int, number: int) -> float:
    """Median time of the decode steps of one request, in microseconds."""
    from dsv4 import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=number, **constraint)
    request = llm.core.new_request(llm.encode(PROMPT), params)
    llm.core.add(request)
    times: list[float] = []
    while not request.finished:
        begin = time.perf_counter()
        llm.core.step()
        times.append(time.perf_counter() - begin)
    llm.reset_prefix_cache()
    assert len(times) >= tokens, f"the output ended after {len(times)} steps; expected {tokens}"
    return statistics.median(itertools.islice(times, 1, None)) * 1e6  # the first reads the prompt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench sampling", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--rounds", type=at_least_one, default=15, metavar="N", help="default: %(default)s")
    add("--tokens", type=at_least_one, default=200, help="of each request (default: %(default)s)")
    add("--threads", type=at_least_one, default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    import torch

    from dsv4 import LLM

    torch.set_num_threads(options.threads)
    llm = LLM(max_model_len=options.tokens + 64)
    takes = {
        f"a draw from {vocab} tokens{name}": draws(vocab, filters)
        for vocab in (NANO_VOCAB, FLASH_VOCAB)
        for name, filters in FILTERS.items()
    }
    schema = {"type": "array", "items": PERSON, "minItems": options.tokens}
    for name, constraint in (("free", {}), ("under a JSON schema", {"json_schema": schema})):
        takes[f"a step, {name}"] = partial(decode, llm, constraint, options.tokens)
    samples = in_turns(takes, options.rounds)
    for name, values in samples.items():
        print(line(name, values, "us"))
    ratios = [masked / free - 1 for free, masked in zip(*list(samples.values())[-2:], strict=True)]
    print(line("longer under the schema", [100 * ratio for ratio in ratios], "%"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
