"""`dsv4 bench latency`: what others wait for while one request is large, with the embedded model.

Tokenising: the longest pause of an event loop, and the slowest of short texts, while a long text is tokenised.
Reading: time to first token of short prompts that come while a long one is read, and the long one's own.
Steps: the long prompt alone, in steps of fewer tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = ("the", "cat", "sat", "on", "12", "+", "30", "is", "what", "function", "return", "world,", "def f(x):\n")
QUESTION = "What is 12 + 30?"
BEAT_SECONDS = 0.005


@dataclass(frozen=True)
class Timing:
    """Seconds from being sent to the first token and to the last."""

    first: float
    total: float


async def tokenise(megabytes: float) -> str:
    """One line: the text, and what happened beside it."""
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
    return (
        f"{megabytes:g} MB, {len(long.result())} tokens, in {time.monotonic() - started:.1f} s; longest pause of the"
        f" event loop {1e3 * pause:.0f} ms; a short text at most {1e3 * max(short):.0f} ms"
    )


async def read(long_tokens: int, shorts: int, answer_tokens: int, apart: float) -> tuple[Timing, list[Timing]]:
    """One long prompt, then short ones, `apart` seconds between them: timings of the long one and of the others."""
    from dsv4 import LLM, AsyncEngine, SamplingParams

    llm = LLM()
    engine = AsyncEngine(llm)
    draw = random.Random(0)

    async def ask(prompt: list[int], tokens: int, delay: float = 0.0) -> Timing:
        await asyncio.sleep(delay)
        sent = time.monotonic()
        first = 0.0
        async for _ in engine.stream(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)):
            first = first or time.monotonic() - sent
        return Timing(first, time.monotonic() - sent)

    try:
        await ask(llm.encode(QUESTION), 4)  # the first forward makes what later ones find
        waiting = [ask(llm.encode(QUESTION), answer_tokens, apart * (i + 1)) for i in range(shorts)]
        prompt = [draw.randrange(3, 1000) for _ in range(long_tokens)]
        long, *others = await asyncio.gather(ask(prompt, 1), *waiting)
        return long, others
    finally:
        engine.close()


def read_in_steps(long_tokens: int, step: int) -> float:
    """Seconds that the long prompt takes alone, so many tokens a step."""
    from dsv4 import LLM, SamplingParams

    llm = LLM(max_num_batched_tokens=step)
    draw = random.Random(0)
    prompt = [draw.randrange(3, 1000) for _ in range(long_tokens)]
    llm.generate([prompt[:step]], SamplingParams(max_tokens=1))
    started = time.monotonic()
    llm.generate([prompt], SamplingParams(max_tokens=1))
    return time.monotonic() - started


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench latency", description=__doc__, allow_abbrev=False)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[5.0], help="texts to tokenise (default: 5)")
    parser.add_argument("--long", type=int, default=50_000, help="tokens of the long prompt (default: %(default)s)")
    parser.add_argument("--short", type=int, default=6, help="short prompts (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of a short answer (default: %(default)s)")
    parser.add_argument("--apart", type=float, default=0.5, help="seconds between the prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="tokens a step to compare (default: none)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the server sets it
    for megabytes in options.megabytes:
        print(asyncio.run(tokenise(megabytes)))
    alone, _ = asyncio.run(read(options.long, 0, 0, 0.0))
    long, others = asyncio.run(read(options.long, options.short, options.answer, options.apart))
    seconds = f"{alone.total:.1f} s alone, {long.total:.1f} s in company"
    print(f"long prompt, {options.long} tokens: first token after {seconds}")
    for name, times in (("first", [t.first for t in others]), ("last", [t.total for t in others])):
        print(f"short prompts, {name} token after: {' '.join(f'{seconds:.2f}' for seconds in times)} s")
    for step in options.steps:
        print(f"long prompt alone, {step} tokens a step: {read_in_steps(options.long, step):.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
