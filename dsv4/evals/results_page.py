"""Page of the results of a whole post-training run: one HTML file with its plots inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from typing import Any

from dsv4.evals import results_plots
from dsv4.evals.post_training_results import Count, Results
from dsv4.training.report import format_seconds

Rows = Sequence[Mapping[str, Any]]

NOTES = {
    "Before and after": "The base, its sft, the domain's specialist, the student, and two other ways to one model: the "
    "mean of the specialists' weights, and one run on all their conversations, of as many tokens as specialists and "
    "student had.",
    "The student against its teachers": "Domains in which the teacher answered nothing right have no bar.",
}
STYLE = """\
:root { color-scheme: light; --ink: #1d2329; --soft: #5b6670; --line: #dfe3e7; --good: #2e7d4f; --bad: #b3401f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); max-width: 46rem; }
svg { display: block; width: 100%; height: auto; } .plots { display: grid; gap: 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { padding: .35rem .6rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td b { font-weight: 600; } small { color: var(--soft); } code { font-size: .8rem; overflow-wrap: anywhere; }
ul { list-style: none; padding: 0; margin: .75rem 0; } li { padding: .15rem 0 .15rem 1.6rem; text-indent: -1.6rem; }
li b { display: inline-block; width: 1.6rem; text-indent: 0; } 
.yes b { color: var(--good); } .no b { color: var(--bad); }
@media (max-width: 40rem) { .plots .scroll svg { min-width: 34rem; } body { padding: 1rem .75rem 3rem; } }
"""


@dataclass(frozen=True)
class StageRecord:
    """A stage of the run: its command or what it did, wall-clock seconds, tokens that its training saw."""

    name: str
    command: str
    seconds: float
    tokens: int = 0


@dataclass(frozen=True)
class RunRecord:
    """Course of a run for its page: metrics of each specialist's GRPO and of distillation, stages, largest
    differences of train and serve by run, None where they were not measured; the command of the whole run, and its
    seed, code and machine in words."""

    title: str
    grpo: Mapping[str, Rows] = field(default_factory=dict[str, Rows])
    student: Rows = ()
    stages: Sequence[StageRecord] = ()
    differences: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    command: str = ""
    made_by: Sequence[str] = ()


def write_page(results: Results, run: RunRecord) -> str:
    """The page. Without matplotlib it has no plots, and says so."""
    parts = [
        f"<h1>{escape(run.title)}</h1>",
        "<p>Every figure is of held-out questions, answered greedily; intervals are of 95 %.</p>",
        *_made(run),
        _findings(results),
        "<h2>Every model in every domain</h2>",
        _scores(results),
        *_grpo(results),
        *_general(results),
        *_plots(results, run),
        *_efforts(results),
        "<h2>Trained and served</h2>",
        "<p>Largest difference between the log-probability that training computed of a sampled token and that of the "
        "engine which sampled it.</p>",
        _table(("run", "difference"), _differences(run.differences)),
        "<h2>Stages</h2>",
        f"<p>{format_seconds(sum(one.seconds for one in run.stages))} in all. Seconds are wall time, without those of "
        "a part that was killed; tokens are those that training saw, with prompts. RUN is the run's folder; BASE and "
        "SFT are models that were given.</p>",
        _stages(run.stages),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def shown(count: Count) -> str:
    """Rate, interval and counts of a cell, as HTML."""
    low, high = count.interval
    return (
        f"{100 * count.rate:.1f} % <small>({100 * low:.0f} to {100 * high:.0f})</small><br>"
        f"<small>{count.correct} of {count.asked}</small>"
    )


def _made(run: RunRecord) -> Iterable[str]:
    if run.command:
        yield f"<p>Made by <code>{escape(run.command)}</code> with {escape('; '.join(run.made_by))}.</p>"


def _findings(results: Results) -> str:
    lines = (
        f'<li class="{"yes" if good else "no"}"><b>{"✓" if good else "✗"}</b>{escape(words)}</li>'
        for good, words in results.findings()
    )
    return f"<ul>\n{chr(10).join(lines)}\n</ul>"


def _scores(results: Results) -> str:
    def cell(model: str, domain: str, count: Count) -> str:
        return f"<b>{shown(count)}</b>" if model == f"specialists.{domain}" else shown(count)

    rows = (
        (escape(name), *(cell(name, domain, row[domain]) for domain in results.domains))
        for name, row in results.scores.rows()
    )
    return _table(("model", *results.domains), rows)


def _grpo(results: Results) -> Iterable[str]:
    if not results.fine_tuned:
        return
    yield "<h2>What GRPO added</h2>"
    yield "<p>Each specialist in its own domain, after fine-tuning and after GRPO.</p>"
    rows = (
        (escape(domain), shown(before), shown(after), f"{100 * low:+.1f} to {100 * high:+.1f}")
        for domain, before, after, (low, high) in results.of_grpo()
    )
    yield _table(("domain", "fine-tuned", "after GRPO", "difference, points"), rows)


def _general(results: Results) -> Iterable[str]:
    if not results.general:
        return
    yield "<h2>General tasks</h2>"
    yield "<p>Tasks of no specialist: the model that all began with, their teacher after GRPO on them, the student.</p>"
    modes = list(results.general["start"])
    rows = ((escape(name), *(shown(row[mode]) for mode in modes)) for name, row in results.general.items())
    yield _table(("model", *modes), rows)


def _plots(results: Results, run: RunRecord) -> Iterable[str]:
    if find_spec("matplotlib") is None:
        yield "<p>Plots need matplotlib, which was not installed.</p>"
        return
    figures = [
        ("Before and after", results_plots.domain_bars(results)),
        ("The student against its teachers", results_plots.student_bars(results)),
    ]
    if run.grpo:
        figures.append(("Reward in GRPO", results_plots.reward_curves(run.grpo)))
        figures.append(("Tokens of an answer in GRPO", results_plots.answer_tokens(run.grpo)))
    if run.student:
        figures.append(("KL in distillation", results_plots.kl_curves(run.student)))
    yield '<div class="plots">'
    for title, svg in figures:
        note = f"<p>{NOTES[title]}</p>" if title in NOTES else ""
        yield f'<section><h2>{title}</h2>{note}<div class="scroll">{svg}</div></section>'
    yield "</div>"


def _efforts(results: Results) -> Iterable[str]:
    if not results.efforts:
        return
    yield "<h2>Levels of reasoning</h2>"
    if find_spec("matplotlib") is not None:
        yield f'<div class="plots"><div class="scroll">{results_plots.effort_curve(results)}</div></div>'
    yield "<p>Each within the window of tokens that its reinforcement learning had, and free of it.</p>"
    yield _table(
        ("level", "right", "mean tokens", "free: right", "mean tokens"),
        ((escape(name), *one.cells()) for name, one in results.efforts.items()),
    )


def _differences(found: Mapping[str, float | None]) -> Iterable[tuple[str, str]]:
    return ((escape(name), "not measured" if value is None else f"{value:g}") for name, value in found.items())


def _stages(stages: Sequence[StageRecord]) -> str:
    lines = ["<tr><th>stage</th><th>time</th><th>tokens</th><th>command</th></tr>"]
    lines += [
        f'<tr><td>{escape(one.name)}</td><td class="number">{format_seconds(one.seconds)}</td>'
        f'<td class="number">{f"{one.tokens:,}" if one.tokens else ""}</td>'
        f"<td><code>{escape(one.command)}</code></td></tr>"
        for one in stages
    ]
    return _scrolling(lines)


def _scrolling(lines: Sequence[str]) -> str:
    """A table of rows, which scrolls where the page is narrow."""
    return f'<div class="scroll"><table>\n{chr(10).join(lines)}\n</table></div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of heads and rows; a row is a name and figures, both HTML."""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for name, *figures in rows:
        cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
        lines.append(f"<tr><td>{name}</td>{cells}</tr>")
    return _scrolling(lines)
