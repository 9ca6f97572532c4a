"""`dsv4 bench latency`: latency of small requests beside a large one, with the embedded model.

Tokenizing: longest pause of an event loop, and slowest of short texts, while a long text is tokenized.
Reading: time to first token of short prompts that arrive during the prefill of a long one, and the long one's own.
Steps: the long prompt alone, in steps of fewer tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.harness.turns import in_turns, line
from dsv4.commands.options import count

WORDS = ("the", "cat", "sat", "on", "12", "+", "30", "is", "what", "function", "return", "world,", "def f(x):\n")
QUESTION = "What is 12 + 30?"
BEAT_SECONDS = 0.005
SHORT_PROMPTS, SECONDS_APART, ANSWER_TOKENS = 6, 0.5, 16

Samples = defaultdict[str, list[float]]


async def tokenize(megabytes: float, samples: Samples) -> float:
    """Seconds to tokenize a text; adds to `samples` the event loop's longest pause and the slowest short text."""
    from dsv4.config import nano_path
    from dsv4.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(nano_path())
    size = int(megabytes * 1e6)
    text = " ".join(random.Random(0).choices(WORDS, k=size // 3))[:size]
    started = last = time.monotonic()
    long = asyncio.create_task(asyncio.to_thread(tokenizer.encode, text))
    pause, short = 0.0, [0.0]
    while not long.done():
        await asyncio.sleep(BEAT_SECONDS)
        pause, last = max(pause, time.monotonic() - last - BEAT_SECONDS), time.monotonic()
        if last - started > len(short):
            await asyncio.to_thread(tokenizer.encode, QUESTION)
            short.append(time.monotonic() - last)
    samples[f"{megabytes:g} MB, longest pause of the event loop"].append(pause)
    samples[f"{megabytes:g} MB, slowest of short texts"].append(max(short))
    return time.monotonic() - started


async def read(tokens: int, step: int | None, shorts: int, samples: Samples) -> float:
    """Seconds of a long prompt; adds to `samples` the times to first and last token of `shorts` short prompts."""
    from dsv4 import LLM, AsyncEngine, SamplingParams

    llm = LLM() if step is None else LLM(max_num_batched_tokens=step)
    engine = AsyncEngine(llm)

    async def ask(prompt: list[int], answer: int, delay: float = 0.0) -> tuple[float, float]:
        await asyncio.sleep(delay)
        sent, first = time.monotonic(), 0.0
        async for _ in engine.stream(prompt, SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0)):
            first = first or time.monotonic() - sent
        return first, time.monotonic() - sent

    draw = random.Random(0)
    prompt, question = [draw.randrange(3, 1000) for _ in range(tokens)], llm.encode(QUESTION)
    try:
        await ask(question, 4)  # warm-up: the first forward allocates and builds handles
        waiting = [ask(question, ANSWER_TOKENS, SECONDS_APART * (i + 1)) for i in range(shorts)]
        (_, seconds), *others = await asyncio.gather(ask(prompt, 1), *waiting)
    finally:
        engine.close()
    for first, last in others:
        samples["short prompts, first token"].append(first)
        samples["short prompts, last token"].append(last)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench latency", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--megabytes", type=float, nargs="*", default=[5.0], help="texts to tokenize (default: 5)")
    add("--long", type=count, default=50_000, help="tokens of the long prompt (default: %(default)s)")
    add("--steps", type=count, nargs="*", default=[], help="tokens per step to compare (default: none)")
    add("--rounds", type=count, default=1, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the server sets it
    beside: Samples = defaultdict(list)
    takes: dict[str, Callable[[int], float]] = {}
    for megabytes in options.megabytes:
        takes[f"{megabytes:g} MB tokenized"] = lambda _, size=megabytes: asyncio.run(tokenize(size, beside))
    for name, step, shorts in (
        ("alone", None, 0),
        ("in company", None, SHORT_PROMPTS),
        *((f"alone, {step} tokens per step", step, 0) for step in options.steps),
    ):
        reading = partial(read, options.long, step, shorts, beside)
        takes[f"long prompt of {options.long} tokens {name}"] = lambda _, reading=reading: asyncio.run(reading())
    for name, samples in {**in_turns(takes, options.rounds), **beside}.items():
        print(line(name, samples, "s"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
