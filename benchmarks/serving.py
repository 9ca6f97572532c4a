"""`dsv4 bench serving`: servers under load, a long prompt asked again, an agent's session, hundreds of streams.

Over real HTTP with one client, streamed. Contenders take turns, each in its own process with its best settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.program import add_options, new_parser, run_benchmark
from dsv4.commands.options import count

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.harness.recording import Measure
    from benchmarks.harness.scenarios import Scenario

SUBJECTS = {
    "load": "tokens per second and times to tokens at 1 to 128 requests at a time, against other servers",
    "prefix": "first token of a long prompt: computed, from memory, from disk after a restart",
    "agent": "20 turns behind 38,000 tokens of system prompt and tools, with the prefix cache and without",
    "streams": "500 streams for 10 minutes, slow and vanishing clients among them: answers, memory, cost of HTTP",
}
MODELS = ("nano", "slice", "large")
LEVELS = (1, 8, 32, 128)
EPILOG = f"""subjects:
{chr(10).join(f"  {name:8} {about}" for name, about in SUBJECTS.items())}

examples:
  dsv4 bench serving load --llama-server "$(make llama-server | tail -n 1)"
  dsv4 bench serving prefix --model slice
  dsv4 bench serving agent
  dsv4 bench serving streams
  dsv4 bench serving load --quick --without-llama --without-transformers --no-gate"""


def run(options: argparse.Namespace, scratch: Path, console: Console) -> None:
    """Measure and record the subject of `options`."""
    from benchmarks.harness import serving_report
    from benchmarks.harness.recording import record

    make: Callable[..., Measure] = {"load": _load, "prefix": _prefix, "agent": _agent, "streams": _streams}[
        options.subject
    ]
    record({f"{options.subject}, {options.model}": make(options, scratch)}, serving_report.lines, options, console)


def _load(options: argparse.Namespace, scratch: Path) -> Measure:
    from benchmarks.harness.load_rounds import LoadRounds, loads

    return LoadRounds(
        scenario=_scenario(options),
        loads=loads(options.levels, options.quick),
        rounds=options.rounds or 3,
        threads=options.threads,
        scratch=scratch,
        llama=options.llama_server,
        with_transformers=not options.without_transformers,
        longest_s=options.longest,
    ).measure


def _prefix(options: argparse.Namespace, scratch: Path) -> Measure:
    from benchmarks.harness.prefix import Repeated

    made = Repeated(
        folder=_folder(options, scratch),
        tokens=600 if options.quick else 32_768,
        rounds=options.rounds or 3,
        threads=options.threads,
        model=options.model,
    )
    return (replace(made, ceilings=(8, 256)) if options.quick else made).measure


def _agent(options: argparse.Namespace, scratch: Path) -> Measure:
    from benchmarks.harness.agent import Session

    made = Session(_folder(options, scratch), options.threads, options.model)
    return (replace(made, turns=3, tokens=600, answer=4, result=20) if options.quick else made).measure


def _streams(options: argparse.Namespace, scratch: Path) -> Measure:
    from benchmarks.harness.streams import Streams

    made = Streams(
        folder=_folder(options, scratch),
        threads=options.threads,
        model=options.model,
        at_once=options.streams,
        seconds=options.seconds,
        rounds=options.rounds or 3,
    )
    small = {"at_once": 12, "seconds": 3.0, "answer": 8, "prompts": 6, "sample_s": 0.2}
    return (replace(made, **small) if options.quick else made).measure


def _scenario(options: argparse.Namespace) -> Scenario:
    """The model that is served, small for a quick run."""
    from benchmarks.harness.load_rounds import with_vocabulary
    from benchmarks.harness.scenarios import SERVED, quick

    return with_vocabulary(quick(SERVED[options.model]) if options.quick else SERVED[options.model])


def _folder(options: argparse.Namespace, scratch: Path) -> Path:
    """Folder of the model's weights, which are written first where they are random."""
    from benchmarks.harness.contenders import write_weights

    place = scratch / f"serving-{options.model}"
    folders, _ = write_weights(
        replace(_scenario(options), peers={"dsv4": {}}), place, options.threads, with_llama=False, with_tokenizer=True
    )
    return folders["dsv4"]


def _levels(text: str) -> tuple[int, ...]:
    return tuple(sorted({count(level) for level in text.split(",")}))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("serving", "Measure dsv4's server, and compare it with others at the same weights.", EPILOG)
    add = parser.add_argument
    add("subject", choices=SUBJECTS, metavar="SUBJECT", help="of those below")
    add(
        "--model",
        choices=MODELS,
        default="nano",
        help="default: %(default)s; random: slice 121M parameters, large 554M",
    )
    add("--llama-server", type=Path, metavar="PATH", help="llama.cpp's llama-server (make llama-server)")
    add("--without-llama", action="store_true", help="load: leave llama-server out")
    add("--without-transformers", action="store_true", help="load: leave `transformers serve` out")
    add("--levels", type=_levels, default=LEVELS, metavar="A,B", help="load: requests at a time; default: 1,8,32,128")
    add("--streams", type=count, default=500, metavar="N", help="streams: at a time; default: %(default)s")
    add("--seconds", type=float, default=600.0, metavar="S", help="streams: default: %(default)g")
    add("--longest", type=float, default=180.0, metavar="S", help="load: skip what others would take longer for")
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.subject == "load" and not options.without_llama and options.llama_server is None:
        parser.error("load: give --llama-server PATH (make llama-server), or --without-llama")
    if options.without_llama:
        options.llama_server = None
    return run_benchmark(parser, run, options)


if __name__ == "__main__":
    sys.exit(main())
