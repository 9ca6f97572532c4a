"""`dsv4 eval domains`: scores of a model in the domains, by effort where efforts are asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv4.commands.options import CommandParser, add_model, count, effort
from dsv4.engine import LLM
from dsv4.evals.domain_scores import COUNT, MAX_TOKENS, DomainScore, evaluate_domain
from dsv4.model_folder import model_name, resolve_model
from dsv4.post_training.domains.domain import LEVELS
from dsv4.post_training.domains.registry import DOMAINS
from dsv4.post_training.effort_names import asked_efforts
from dsv4.post_training.efforts import check_ladder

DESCRIPTION = "Score a model on problems of the domains that training never saw: greedy answers, or whole episodes."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `dsv4 eval domains`."""
    parser = CommandParser(prog="dsv4 eval domains", description=DESCRIPTION)
    add_model(parser, "--model")
    names = sorted(DOMAINS)
    parser.add_argument("--domains", nargs="+", choices=names, default=names, metavar="DOMAIN", help=", ".join(names))
    parser.add_argument("--n", type=count, default=COUNT, help="problems per domain (default: %(default)s)")
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0], help="default: %(default)s")
    efforts = "with thinking, at each of these: low, high, max, or budgets of 1 to 100"
    parser.add_argument("--efforts", nargs="+", type=effort, default=[], metavar="EFFORT", help=efforts)
    parser.add_argument("--thinking", action="store_true", help="with thinking (default: as the problems have it)")
    parser.add_argument("--max-tokens", type=count, default=MAX_TOKENS, help="of an answer (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_whole(arguments)
    model = resolve_model(options.model)
    asked = asked_efforts(options.efforts)
    check_ladder(model, asked)
    llm = LLM(model, max_num_seqs=32, device=options.device)
    thinking = True if options.thinking or asked else None
    rows = [
        (domain, one, evaluate_domain(
            llm, domain, options.n, thinking=thinking, efforts=(one,) if one else (), max_tokens=options.max_tokens,
            level=options.level,
        ))
        for domain in options.domains
        for one in asked or (None,)
    ]  # fmt: skip
    if options.json:
        settings = {"model": model_name(model), "level": options.level, "thinking": thinking, "greedy": True}
        print(json.dumps({"settings": settings, "scores": [_entry(*row) for row in rows]}, indent=2))
        return 0
    table = Table("domain", "effort", "correct", "asked", "95 %", "tokens")
    for domain, one, score in rows:
        low, high = score.interval
        interval, tokens = f"{100 * low:.0f}-{100 * high:.0f} %", f"{score.mean_tokens:.0f}"
        table.add_row(domain, str(one or "-"), str(score.correct), str(score.asked), interval, tokens)
    Console().print(table)
    return 0


def _entry(domain: str, effort: str | int | None, score: DomainScore) -> dict[str, Any]:
    low, high = score.interval
    return {
        "domain": domain, "effort": effort, "correct": score.correct, "asked": score.asked, "low95": low,
        "high95": high, "tokens": score.mean_tokens,
    }  # fmt: skip
