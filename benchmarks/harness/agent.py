"""An agent's session over HTTP, replayed with and without the prefix cache: each turn adds an answer and a result."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.client import Json, Reply, chat
from benchmarks.harness.load import Writer, writer
from benchmarks.harness.process import BenchmarkError
from benchmarks.harness.recording import Show
from benchmarks.harness.results import Row, Run
from benchmarks.harness.servers import Running, dsv4_server

CACHE, NO_CACHE = "cache", "no cache"
FLAGS = {CACHE: (), NO_CACHE: ("--no-prefix-caching",)}
SAMPLINGS: dict[str, Json] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 7}}
TOOLS = 10
TOOL_SHARE = 0.5  # of the first prompt
FIRST, PROMPT, CACHED = "first token", "prompt tokens", "cached tokens"


@dataclass(frozen=True)
class Session:
    """`turns` requests; the first has about `tokens` tokens, of system prompt and tools. Lengths are tokens."""

    folder: Path
    threads: int
    model: str
    turns: int = 20
    tokens: int = 38_000
    answer: int = 48
    result: int = 150

    def measure(self, show: Show) -> Run:
        run = Run(f"serving agent {self.model}", [], {}, {"turns": self.turns}, threads=self.threads)
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(dsv4_server(self.folder, self.threads, *flags).running(self.threads))
                for name, flags in FLAGS.items()
            }
            for name, sampling in SAMPLINGS.items():
                run.rows += asyncio.run(self._replay(servers, name, sampling, show))
        return run

    async def _replay(self, servers: dict[str, Running], name: str, sampling: Json, show: Show) -> list[Row]:
        """Rows of each turn and server. BenchmarkError where an answer differs."""
        script = Script(writer(self.folder), random.Random(name), self)
        common = {**dsv4_server(self.folder, 1).request, **sampling, "max_tokens": self.answer, "tools": script.tools}
        rows: list[Row] = []
        for turn in range(1, self.turns + 1):
            replies: dict[str, Reply] = {}
            for server in sorted(servers, reverse=turn % 2 == 0):
                show(f"{name}, turn {turn} of {self.turns}: {server}")
                replies[server] = await chat(servers[server].port, {**common, "messages": script.messages})
            if len({(reply.text, reply.tokens) for reply in replies.values()}) != 1:
                raise BenchmarkError(
                    f"{name}, turn {turn}: the answers differ: { {k: r.text for k, r in replies.items()} }"
                )
            for server, reply in replies.items():
                figures = {FIRST: reply.first_s, PROMPT: reply.prompt_tokens, CACHED: reply.cached_tokens}
                rows += [Row(server, f"{what}, {name}", turn, [value], 0.0) for what, value in figures.items()]
            script.go_on(replies[CACHE].text, turn)
        return rows


@dataclass
class Script:
    """The session's messages; the model's answers are its own, the calls and results are invented."""

    writer: Writer
    draw: random.Random
    session: Session
    messages: list[Json] = field(default_factory=list[Json])
    tools: list[Json] = field(default_factory=list[Json])

    def __post_init__(self) -> None:
        tokens = self.session.tokens
        each = round(tokens * TOOL_SHARE / TOOLS)
        self.tools = [_tool(i, self.writer.write(each, self.draw)) for i in range(TOOLS)]
        system = self.writer.write(round(tokens * (1 - TOOL_SHARE)), self.draw)
        question = self.writer.write(self.session.result, self.draw)
        self.messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]

    def go_on(self, answer: str, turn: int) -> None:
        """Add the model's answer, a call, and the tool's result."""
        function = {"name": f"tool_{turn % TOOLS}", "arguments": f'{{"place": "{turn}"}}'}
        call = {"id": f"call_{turn}", "type": "function", "function": function}
        result = self.writer.write(self.session.result, self.draw)
        self.messages += [
            {"role": "assistant", "content": answer, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": result},
        ]


def hit_rate(run: Run, name: str, first: int = 1) -> float:
    """Cached tokens over prompt tokens of the turns from `first` on."""

    def total(what: str) -> float:
        return sum(row.median for row in turns_of(run, CACHE, f"{what}, {name}") if row.tokens >= first)

    return total(CACHED) / total(PROMPT)


def turns_of(run: Run, peer: str, measure: str) -> Sequence[Row]:
    return [row for row in run.rows if (row.peer, row.measure) == (peer, measure)]


def _tool(number: int, description: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    return {
        "type": "function",
        "function": {"name": f"tool_{number}", "description": description, "parameters": parameters},
    }
