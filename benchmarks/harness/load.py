"""Load of a server: prompts of mixed lengths, a number of them at a time."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.harness.client import Json, Reply, chat
from benchmarks.harness.process import BenchmarkError
from benchmarks.harness.servers import Server
from dsv4.config import nano_path
from dsv4.tokenizer import Tokenizer

WARM_UP = 2  # short requests before the counted ones
WORDS = 400  # different words of the prompts


@dataclass(frozen=True)
class Load:
    """Requests at a concurrency: `shortest` to `longest` tokens of prompt, evenly spread over the logarithm."""

    concurrency: int
    requests: int
    shortest: int
    longest: int
    answer: int  # tokens

    def lengths(self, seed: int) -> list[int]:
        ratio, count = self.longest / self.shortest, self.requests
        spread = [round(self.shortest * ratio ** ((i + 0.5) / count)) for i in range(count)]
        random.Random(seed).shuffle(spread)
        return spread

    @property
    def context(self) -> int:
        """Tokens that one request may hold: the prompt's length is known up to its last word."""
        return self.longest + self.answer + 64

    @property
    def held(self) -> int:
        """Most tokens that the requests under way may hold together."""
        longest = sorted(self.lengths(0))[-self.concurrency :]
        return sum(longest) + len(longest) * (self.context - self.longest)


class Writer:
    """Texts of a wanted number of tokens, of random words, so that no two of them begin alike."""

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        words = list(dict.fromkeys(re.findall(r"[a-z]+", source)))[:WORDS]
        self._tokens = {f" {word}": len(tokenizer.encode(f" {word}")) for word in words}

    def write(self, tokens: int, draw: random.Random) -> str:
        words, left, choices = list[str](), tokens, list(self._tokens)
        while left > 0:
            words.append(draw.choice(choices))
            left -= self._tokens[words[-1]]
        return "".join(words)


@dataclass(frozen=True)
class Measured:
    replies: list[Reply]  # in the order of the prompts
    seconds: float
    peak_bytes: int

    def figures(self) -> dict[str, float]:
        """Figures by name: tokens per second, seconds, bytes."""
        first, between = [r.first_s for r in self.replies], [r.between_s for r in self.replies]
        output = sum(r.tokens for r in self.replies)
        return {
            "total tokens": (output + sum(r.prompt_tokens for r in self.replies)) / self.seconds,
            "output tokens": output / self.seconds,
            "first token, median": median(first),
            "first token, p95": percentile(first, 0.95),
            "between tokens, median": median(between),
            "between tokens, p95": percentile(between, 0.95),
            "peak memory": float(self.peak_bytes),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def measure(server: Server, threads: int, load: Load, prompts: Sequence[str]) -> Measured:
    """Start the server, warm it up, send all prompts, `load.concurrency` at a time, and stop it."""
    with server.running(threads) as running:
        replies, seconds = asyncio.run(_send(running.port, server.request, load, prompts))
        return Measured(replies, seconds, running.peak_bytes())


async def _send(port: int, common: Json, load: Load, prompts: Sequence[str]) -> tuple[list[Reply], float]:
    def request(prompt: str, tokens: int) -> Json:
        return {**common, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}

    for _ in range(WARM_UP):
        await chat(port, request("Warm up.", 4))
    turns = asyncio.Semaphore(load.concurrency)

    async def one(prompt: str) -> Reply:
        async with turns:
            return await chat(port, request(prompt, load.answer))

    start = perf_counter()
    replies = await asyncio.gather(*map(one, prompts))
    seconds = perf_counter() - start
    wrong = [reply.tokens for reply in replies if reply.tokens != load.answer]
    if wrong:
        raise BenchmarkError(f"{len(wrong)} answers have not {load.answer} tokens, but {wrong[:5]}")
    return replies, seconds


def writer(folder: Path) -> Writer:
    """Writer with the words of nano's README, in a model's tokenizer."""
    return Writer(Tokenizer.from_pretrained(folder), (nano_path() / "README.md").read_text(encoding="utf-8"))
