"""`dsv4 bench speculation`: acceptance of the MTP block's drafts and decoding speed on evaluation questions, by task.

Engines of every draft length answer each question in turn, several rounds; a question's time is its fastest, from the
first token on. All must give the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.harness.turns import in_turns

if TYPE_CHECKING:
    from dsv4.engine import LLM, SamplingParams

Clock = Callable[[], float]
DESCRIPTION = "Measure speculative decoding: drafts accepted per position, tokens per second per draft length."
ADAPTIVE = "adaptive"


def new_engine(model: str | None, length: int, adaptive: bool) -> LLM:
    """An engine that drafts `length` tokens in every step, or as many as pay. It stores no prefixes."""
    from dsv4.engine import LLM
    from dsv4.engine.draft_length import FixedLength

    llm = LLM(model, speculate=length, enable_prefix_caching=False)
    if llm.core.speculator is not None and not adaptive:
        llm.core.speculator.lengths = FixedLength(length)
    return llm


def answer(llm: LLM, prompts: list[list[int]], params: SamplingParams, clock: Clock) -> tuple[list[list[int]], float]:
    """(token ids of each answer, seconds from the first token of the last one to get it)."""
    core, started = llm.core, 0.0
    requests = [core.new_request(prompt, params) for prompt in prompts]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
        if not started and all(request.output.token_ids for request in requests):
            started = clock()
    return [request.output.token_ids for request in requests], clock() - started


def fastest(
    task: str, engines: dict[str, LLM], prompts: list[list[int]], params: SamplingParams, rounds: int, clock: Clock
) -> tuple[int, dict[str, float]]:
    """(tokens after the first of each answer, least seconds of each engine). SystemExit where the tokens differ."""
    given: list[list[list[int]]] = []

    def take(name: str, _: int) -> float:
        ids, seconds = answer(engines[name], prompts, params, clock)
        given.append(ids)
        if ids != given[0]:
            raise SystemExit(f"{task}: {name} drafts give other tokens than the others")
        return seconds

    samples = in_turns({name: partial(take, name) for name in engines}, rounds)
    return sum(len(ids) - 1 for ids in given[0]), {name: min(found) for name, found in samples.items()}


def measure(options: argparse.Namespace) -> None:
    import torch

    from dsv4.data.tasks import TASKS
    from dsv4.engine import SamplingParams

    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.threads:
        torch.set_num_threads(options.threads)
    most = max(options.lengths)
    engines = {str(length): new_engine(options.model, length, False) for length in sorted({*options.lengths} - {0})}
    engines["0"] = new_engine(options.model, 0, False)
    engines[ADAPTIVE] = new_engine(options.model, most, True)
    prompts = engines["0"].prompts
    if prompts is None:
        raise SystemExit("the model has no tokenizer; tasks are asked in text")
    names = "".join(f"{name:>10}" for name in engines)
    print(f"{'task':18} {'T':3} {'tokens':>6}  {names}  accepted per position")
    for temperature in options.temperatures:
        for task in options.tasks or list(TASKS):
            params = SamplingParams(temperature=temperature, seed=1, max_tokens=options.max_tokens)
            examples = [TASKS[task].sample(seed, split="eval") for seed in range(options.examples)]
            asked = [prompts.encode(example.prompt()) for example in examples]
            for llm in engines.values():
                if llm.core.speculator is not None:
                    llm.core.speculator.stats = type(llm.core.speculator.stats)()
                answer(llm, [asked[0]], params, clock)  # warms up
            tokens, best = 0, dict.fromkeys(engines, 0.0)
            for start in range(0, len(asked), options.concurrent):
                group = asked[start : start + options.concurrent]
                counted, seconds = fastest(task, engines, group, params, options.rounds, clock)
                tokens += counted
                for name, least in seconds.items():
                    best[name] += least
            last = engines[str(most)].core.speculator
            rates = "" if last is None else " ".join(f"{rate:.2f}" for rate in last.stats.acceptance_rate_per_pos)
            speeds = "".join(f"{tokens / spent:10.0f}" for spent in best.values())
            print(f"{task:18} {temperature:3} {tokens:6}  {speeds}  {rates}", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench speculation", description=DESCRIPTION)
    parser.add_argument("--model", metavar="MODEL", help="folder or name (default: the embedded model)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3], metavar="K", help="draft tokens per step")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of dsv4 eval (default: all)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T")
    parser.add_argument(
        "--examples", type=int, default=4, metavar="N", help="questions per task (default: %(default)s)"
    )
    parser.add_argument("--concurrent", type=int, default=1, metavar="N", help="questions at a time")
    parser.add_argument("--max-tokens", type=int, default=160, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a busy machine, one thread")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the kernels (default: all cores)")
    measure(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
