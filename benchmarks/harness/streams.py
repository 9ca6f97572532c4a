"""Hundreds of streams at a time, among them slow clients and such that vanish: answers, memory, and the cost of HTTP.

Every answer is compared with the one that the same request got alone. The engine is first measured without a server.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks.harness.client import Json
from benchmarks.harness.load import Writer, writer
from benchmarks.harness.process import BenchmarkError, Process
from benchmarks.harness.recording import Show
from benchmarks.harness.results import Row, Run
from benchmarks.harness.servers import Server, dsv4_server
from benchmarks.harness.stream_client import Heard, Manner, stream

RATE, PROCESSOR, MEMORY = "output tokens", "processor time per token", "memory"
BARE, ENGINE, HTTP = "engine alone", "engine of the server", "server"
SEED = 23
SPARE = 4  # texts per prompt that is measured


@dataclass
class Counts:
    """Of the streams' ends."""

    ends: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])  # of answers that are lost or wrong


@dataclass(frozen=True)
class Streams:
    """`at_once` streams for `seconds`; `vanishing` and `slow` are shares of them. Lengths are tokens."""

    folder: Path
    threads: int
    model: str
    at_once: int = 500
    seconds: float = 600.0
    answer: int = 64
    prompts: int = 64
    prompt: int = 40
    rounds: int = 3
    vanishing: float = 0.1
    slow: float = 0.1
    sample_s: float = 5.0  # between two looks at the memory

    def measure(self, show: Show) -> Run:
        about = {"at_once": self.at_once, "seconds": self.seconds, "answer": self.answer}
        run = Run(f"serving streams {self.model}", [], {}, about, threads=self.threads)
        server = self._server()
        with server.running(self.threads) as running:
            family = _family(running.pid)
            show("each answer alone")
            candidates = Asked(server, running.port, self._texts(), self.answer)
            asked, expected = asyncio.run(candidates.whole_answers(self.prompts))
            tokens = [asked.token_ids(place) for place in range(self.prompts)]
            show("through HTTP, prompt clients")
            through = [asyncio.run(self._rated(asked, expected, family)) for _ in range(self.rounds)]
            show(f"slow and vanishing clients, {self.seconds:.0f} s")
            counts, memory = asyncio.run(self._mixed(asked, expected, family))
            run.settings["after"] = _health(running.port)
        show("the engine alone")
        with Process("dsv4", self.threads) as process:
            alone = process.call(rated_alone, self.folder, self._options(), tokens, self.answer, self.rounds)
        run.rows = [*_rates(self.at_once, through, alone), *_memory(memory)]
        run.settings |= {"ends": dict(counts.ends), "faults": len(counts.faults)}
        run.failures = counts.faults[:5]
        return run

    def _options(self) -> dict[str, Any]:
        length = 2 * (self.prompt + self.answer) + 64
        return {"max_num_seqs": self.at_once, "max_model_len": length, "enable_prefix_caching": False}

    def _server(self) -> Server:
        options = self._options()
        flags = ["--max-num-seqs", str(self.at_once), "--max-model-len", str(options["max_model_len"])]
        return dsv4_server(self.folder, self.threads, *flags, "--no-prefix-caching", "--max-waiting", "4096")

    def _texts(self) -> list[str]:
        words: Writer = writer(self.folder)
        return [words.write(self.prompt, random.Random(SEED + place)) for place in range(SPARE * self.prompts)]

    async def _rated(self, asked: Asked, expected: Sequence[str], family: Sequence[int]) -> Rated:
        """Tokens per second and processor seconds of one request per stream, all at once."""
        before, began = _processor_seconds(family), perf_counter()
        places = [i % len(expected) for i in range(self.at_once)]
        answers = await asyncio.gather(*(asked.ask(place, "prompt") for place in places))
        seconds, spent = perf_counter() - began, _processor_seconds(family)
        faults = [
            fault for place, heard in zip(places, answers, strict=True) if (fault := _fault(heard, expected[place]))
        ]
        if faults:
            raise BenchmarkError(f"{len(faults)} of {self.at_once} answers are wrong: {faults[0]}")
        tokens = self.at_once * self.answer
        return Rated(tokens / seconds, *((after - start) / tokens for start, after in zip(before, spent, strict=True)))

    async def _mixed(
        self, asked: Asked, expected: Sequence[str], family: Sequence[int]
    ) -> tuple[Counts, list[tuple[float, int, int]]]:
        """Ends of all streams, and (second, the server's bytes, the engine's) of each look."""
        counts, began = Counts(), perf_counter()
        memory: list[tuple[float, int, int]] = []

        async def client(number: int) -> None:
            draw = random.Random(number)
            while perf_counter() - began < self.seconds:
                place = draw.randrange(len(expected))
                luck = draw.random()
                manner: Manner = "prompt" if luck > self.vanishing + self.slow else "slow"
                manner = "vanishing" if luck < self.vanishing else manner
                heard = await asked.ask(place, manner, leave_after=draw.randrange(100 * self.answer))
                fault = None if heard is None else _fault(heard, expected[place])
                counts.ends["vanished" if heard is None else f"{manner}: wrong" if fault else f"{manner}: right"] += 1
                if fault:
                    counts.faults.append(f"{manner}: {fault}")

        async def look() -> None:
            while True:
                server, engine = map(_resident_bytes, family)
                memory.append((perf_counter() - began, server, engine))
                await asyncio.sleep(self.sample_s)

        looking = asyncio.create_task(look())
        await asyncio.gather(*(client(number) for number in range(self.at_once)))
        if looking.done():
            looking.result()  # raises
        looking.cancel()
        return counts, memory


@dataclass(frozen=True)
class Rated:
    rate: float  # tokens per second
    server: float  # processor seconds per token
    engine: float


@dataclass(frozen=True)
class Asked:
    """The requests of a run."""

    server: Server
    port: int
    texts: Sequence[str]
    answer: int

    async def ask(self, place: int, manner: Manner, leave_after: int = 0) -> Heard | None:
        return await stream(self.port, self._request(place), manner, leave_after)

    async def whole_answers(self, count: int) -> tuple[Asked, list[str]]:
        """The first `count` requests whose answer, alone, has its full length, and those answers.

        A model with random weights may write a tool call, which ends its answer. BenchmarkError if a request fails, or
        too many end early.
        """
        found: dict[str, str] = {}
        for place, text in enumerate(self.texts):
            heard = await self.ask(place, "prompt")
            if heard is None or heard.failure:
                raise BenchmarkError(f"request {place} alone: {heard}")
            if heard.tokens == self.answer:
                found[text] = heard.text
            if len(found) == count:
                break
        different = len(set(found.values()))
        if len(found) < count or different < count * 0.9:
            raise BenchmarkError(f"{len(self.texts)} requests have {len(found)} whole answers, {different} different")
        return replace(self, texts=list(found)), list(found.values())

    def token_ids(self, place: int) -> list[int]:
        """The prompt as the engine gets it."""
        request = self._request(place)
        kept = {name: request[name] for name in ("model", "messages", "thinking")}
        data, kind = json.dumps(kept).encode(), {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/tokenize", data, kind)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)["tokens"]

    def _request(self, place: int) -> Json:
        messages = [{"role": "user", "content": self.texts[place]}]
        return {**self.server.request, "messages": messages, "max_tokens": self.answer}


def grown(row: Row) -> float:
    """Growth of a memory row from its second quarter to its last, as a share."""
    quarter = max(1, len(row.samples) // 4)
    early, late = row.samples[quarter : 2 * quarter] or row.samples[:1], row.samples[-quarter:]
    return sum(late) / len(late) / (sum(early) / len(early)) - 1


def _fault(heard: Heard | None, expected: str) -> str | None:
    """The fault of an answer, None if it has none."""
    if heard is None:
        return "it has vanished"
    if heard.failure is not None:
        return heard.failure
    return None if heard.text == expected else f"{heard.text[:200]!r} in place of {expected[:200]!r}"


def _rates(at_once: int, through: Sequence[Rated], alone: Sequence[tuple[float, float]]) -> list[Row]:
    return [
        Row(BARE, RATE, at_once, [rate for rate, _ in alone], 0.0),
        Row(HTTP, RATE, at_once, [rated.rate for rated in through], 0.0),
        Row(BARE, PROCESSOR, at_once, [seconds for _, seconds in alone], 0.0),
        Row(ENGINE, PROCESSOR, at_once, [rated.engine for rated in through], 0.0),
        Row(HTTP, PROCESSOR, at_once, [rated.server for rated in through], 0.0),
    ]


def _memory(found: Sequence[tuple[float, int, int]]) -> list[Row]:
    """Memory over time: one sample per look."""
    seconds = round(found[-1][0])
    return [
        Row(name, MEMORY, seconds, [float(look[place]) for look in found], 0.0)
        for place, name in ((1, HTTP), (2, ENGINE))
    ]


def _health(port: int) -> Json:
    """GET /health after the streams, once nothing runs; BenchmarkError if requests remain."""
    deadline = perf_counter() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
            state: Json = json.load(answer)
        if not state["running"] and not state["waiting"]:
            return state
        if perf_counter() > deadline:
            raise BenchmarkError(f"requests are left after all clients have gone: {state}")


def _family(pid: int) -> tuple[int, int]:
    """The server's process and its engine's, found once: an engine that is started again is a fault."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            children += map(int, (task / "children").read_text().split())
    if len(children) != 1:
        raise BenchmarkError(f"the server has {len(children)} processes for its engine; 1 was expected")
    return pid, children[0]


def _processor_seconds(family: Sequence[int]) -> tuple[float, float]:
    """Processor time that the server has used, and its engine."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13] for one in family]
    server, engine = (sum(map(int, times)) / ticks for times in found)
    return server, engine


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Below: a function of dsv4's own process.


def rated_alone(
    folder: Path, options: dict[str, Any], prompts: list[list[int]], answer: int, rounds: int
) -> list[tuple[float, float]]:
    """(Tokens per second, processor seconds per token) of each round: as many requests as it computes at once."""
    from dsv4 import LLM, SamplingParams
    from dsv4.engine import AsyncEngine

    engine = AsyncEngine(LLM(folder, max_num_waiting=4096, **options))
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)

    async def one(prompt: list[int]) -> int:
        return sum([len(event.token_ids) async for event in engine.stream(prompt, params)])

    async def all_at_once() -> int:
        count = options["max_num_seqs"]
        return sum(await asyncio.gather(*(one(prompts[i % len(prompts)]) for i in range(count))))

    found: list[tuple[float, float]] = []
    try:
        asyncio.run(all_at_once())  # the first forward allocates
        for _ in range(rounds):
            began, spent = perf_counter(), process_time()
            tokens = asyncio.run(all_at_once())
            assert tokens == options["max_num_seqs"] * answer, "as many as through HTTP"
            found.append((tokens / (perf_counter() - began), (process_time() - spent) / tokens))
    finally:
        engine.close()
    return found
