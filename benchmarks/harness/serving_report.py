"""Runs of `dsv4 bench serving` as Markdown tables, for the terminal and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import agent, prefix, streams
from benchmarks.harness.report import table
from benchmarks.harness.results import Row, Run

PEERS = ("llama.cpp", "transformers")
RATES = ("total tokens", "output tokens")
SUBJECTS = ("load", "prefix", "agent", "streams")


def lines(run: Run) -> list[str]:
    """Description, table and notes of one run."""
    _, subject, model = run.scenario.split()
    head, body, notes = {"load": _load, "prefix": _prefix, "agent": _agent, "streams": _streams}[subject](run)
    failed = [f"Failed: {' '.join(text.split())[:600]}" for text in run.failures]
    about = f"{head[:1].upper()}{head[1:]}. Model {model}, {run.threads} threads"
    return [f"{about}, medians ± half the range{run.warning}.", "", *body, "", *notes, *failed, ""]


def command(run: Run) -> str:
    _, subject, model = run.scenario.split()
    llama = ' --llama-server "$(make llama-server | tail -n 1)"' if subject == "load" else ""
    return f"`dsv4 bench serving {subject} --model {model}{llama}`"


def _load(run: Run) -> tuple[str, list[str], list[str]]:
    """One line per figure and concurrency: dsv4, its share of the floor, each other server and dsv4's lead."""
    rows: list[list[str]] = []
    for what in dict.fromkeys(row.measure for row in run.rows):
        for level in sorted({row.tokens for row in run.rows}):
            ours = run.find("dsv4", what, level)
            if ours is None:
                continue
            share = f"{100 * ours.median / ours.floor:.0f} %" if ours.floor else ""
            cells = [f"{what}, {level}", figure(ours), share]
            for peer in PEERS:
                theirs = run.find(peer, what, level)
                cells += [figure(theirs), "" if theirs is None else f"{ahead(ours, theirs):.2f}"]
            rows.append(cells)
    head = [
        "tokens/s and ms at 1 and more requests",
        "dsv4",
        "of floor",
        *(c for peer in PEERS for c in (peer, "ahead")),
    ]
    alike = [f"{name} {100 * share:.0f} %" for name, share in run.settings["alike"].items() if name != "dsv4"]
    notes = [
        f"Prompts of 100 to 8,000 tokens, no two alike, answers of {run.settings['answer']} tokens, streamed; ahead: "
        "how many times dsv4 is faster. Floor: all operations at the faster rate, or the weights read once per step.",
        *([f"Answers that begin as dsv4's: {', '.join(alike)}."] if alike else []),
    ]
    return "servers under the same load, greedy", table(head, rows), notes


def _prefix(run: Run) -> tuple[str, list[str], list[str]]:
    rows: list[list[str]] = []
    cold = next(row for row in run.rows if row.peer == prefix.COLD)
    for row in run.rows:
        if row.measure == prefix.MEASURE:
            size = run.find(row.peer, prefix.BYTES, row.tokens)
            share = f"{100 * row.median / cold.median:.2f} %"
            least = f"{1000 * row.floor:,.1f} ms"
            rows.append(
                [_source(row.peer), figure(row), share, least, "" if size is None else f"{size.median / 1e6:.2f} MB"]
            )
    about = f"first token of a prompt of {cold.tokens:,} tokens: computed, and again"
    return about, table(["", "first token", "of cold", "floor", "stored"], rows), []


def _source(peer: str) -> str:
    return peer if peer in (prefix.COLD, prefix.MEMORY) else f"disk after a restart, {peer}"


def _agent(run: Run) -> tuple[str, list[str], list[str]]:
    rows: list[list[str]] = []
    last = run.settings["turns"]
    for turn in sorted({1, 2, *range(5, last, 5), last} & {row.tokens for row in run.rows}):
        tokens = run.find(agent.CACHE, f"{agent.PROMPT}, greedy", turn)
        cells = [f"{turn}", "" if tokens is None else f"{tokens.median:,.0f}"]
        for name in agent.SAMPLINGS:
            cells += [figure(run.find(peer, f"{agent.FIRST}, {name}", turn)) for peer in (agent.CACHE, agent.NO_CACHE)]
        rows.append(cells)
    names = [f"{name}, {peer}" for name in agent.SAMPLINGS for peer in (agent.CACHE, agent.NO_CACHE)]
    rates = [
        f"{name} {100 * agent.hit_rate(run, name, 2):.2f} % ({100 * agent.hit_rate(run, name):.2f} % with turn 1)"
        for name in agent.SAMPLINGS
    ]
    notes = [f"Prompt tokens from the cache: {', '.join(rates)}. All {2 * last} answers equal those without a cache."]
    return (
        "first token of each turn of an agent's session, with the prefix cache and without",
        table(["turn", "prompt", *names], rows),
        notes,
    )


def _streams(run: Run) -> tuple[str, list[str], list[str]]:
    at_once, rows = run.settings["at_once"], list[list[str]]()
    for row in run.rows:
        if row.measure == streams.MEMORY:
            first, last = row.samples[0] / 1e6, row.samples[-1] / 1e6
            rows.append(
                [f"memory, {row.peer}", f"{first:,.0f} to {last:,.0f} MB", f"{100 * streams.grown(row):+.1f} %"]
            )
        else:
            unit = "/s" if row.measure == streams.RATE else " us"
            value = row.median * (1 if row.measure == streams.RATE else 1e6)
            rows.append([f"{row.measure}, {row.peer}", f"{value:,.{0 if value >= 100 else 1}f}{unit}", ""])
    ends = ", ".join(f"{count:,} {what}" for what, count in sorted(run.settings["ends"].items()))
    notes = [
        "Medians of rounds of one request per stream. Processor time per token of an answer. Growth: of memory, from "
        "the second quarter to the last.",
        *_cost_of_http(run, at_once),
        f"Streams of {run.settings['seconds']:.0f} s: {ends}.",
    ]
    return f"{at_once} streams at a time, some slow, some vanishing", table(["", "", "growth"], rows), notes


def _cost_of_http(run: Run, at_once: int) -> list[str]:
    """Sentence on the server beside the engine alone: processor time of its process, and wall time."""
    rows = [
        run.find(peer, measure, at_once)
        for peer, measure in (
            (streams.HTTP, streams.PROCESSOR),
            (streams.BARE, streams.PROCESSOR),
            (streams.HTTP, streams.RATE),
            (streams.BARE, streams.RATE),
        )
    ]
    medians = [row.median for row in rows if row is not None]
    if len(medians) < len(rows):
        return []
    spent, bare, rate, bare_rate = medians
    return [
        f"The server's process takes {100 * spent / bare:.1f} % of the processor time of the engine alone for the same "
        f"requests; through HTTP they take {100 * (bare_rate / rate - 1):+.1f} % of its wall time more."
    ]


def figure(row: Row | None) -> str:
    """Median with unit and, for several rounds, half the range in percent of the median."""
    if row is None:
        return ""
    if row.measure == "peak memory":
        return f"{row.median / 1e9:.2f} GB"
    if row.measure in RATES:
        return f"{row.median:,.0f}{row.spread}"
    milliseconds = 1000 * row.median
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1}f} ms{row.spread}"


def ahead(ours: Row, theirs: Row) -> float:
    """Ratio by which ours is better: more of a rate, less of a time or of memory."""
    ratio = ours.median / theirs.median
    return ratio if ours.measure in RATES else 1 / ratio


def sections(runs: dict[str, Run]) -> Sequence[Run]:
    """Runs of serving among the newest ones, subject by subject."""
    found = [run for name, run in runs.items() if name.startswith("serving ")]
    return sorted(found, key=lambda run: SUBJECTS.index(run.scenario.split()[1]))
