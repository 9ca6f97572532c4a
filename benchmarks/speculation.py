"""`dsv4 bench speculation`: acceptance of the MTP block's drafts and decoding speed on evaluation questions, by task.

Engines of every draft length answer each question in turn, several rounds; a question's time is its fastest, from the
first token on. All must give the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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


def measure(options: argparse.Namespace) -> None:
    import torch

    from dsv4.data.tasks import TASKS
    from dsv4.engine import SamplingParams

    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.threads:
        torch.set_num_threads(options.threads)
    lengths = range(max(options.lengths) + 1)
    engines = {str(length): new_engine(options.model, length, False) for length in lengths if length in options.lengths}
    engines["0"] = new_engine(options.model, 0, False)
    engines[ADAPTIVE] = new_engine(options.model, max(options.lengths), True)
    prompts = engines["0"].prompts
    if prompts is None:
        raise SystemExit("the model has no tokenizer; tasks are asked in text")
    print(
        f"{'task':18} {'T':3} {'tokens':>6}  " + "".join(f"{name:>10}" for name in engines) + "  accepted per position"
    )
    for temperature in options.temperatures:
        for task in options.tasks or list(TASKS):
            params = SamplingParams(temperature=temperature, seed=1, max_tokens=options.max_tokens)
            examples = [TASKS[task].sample(seed, split="eval") for seed in range(options.examples)]
            asked = [prompts.encode(example.prompt()) for example in examples]
            groups = [asked[i : i + options.concurrent] for i in range(0, len(asked), options.concurrent)]
            best = dict.fromkeys(engines, 0.0)
            tokens = 0
            for llm in engines.values():
                if llm.core.speculator is not None:
                    llm.core.speculator.stats = type(llm.core.speculator.stats)()
                answer(llm, [asked[0]], params, clock)
            for group in groups:
                fastest: dict[str, float] = {}
                expected: list[list[int]] | None = None
                for turn in range(options.rounds):
                    for name in list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]:
                        ids, seconds = answer(engines[name], group, params, clock)
                        fastest[name] = min(seconds, fastest.get(name, seconds))
                        expected = expected or ids
                        if ids != expected:
                            raise SystemExit(f"{task}: {name} drafts give other tokens than none")
                assert expected is not None
                tokens += sum(len(ids) - 1 for ids in expected)
                for name, seconds in fastest.items():
                    best[name] += seconds
            last = engines[str(max(options.lengths))].core.speculator
            rates = "" if last is None else " ".join(f"{rate:.2f}" for rate in last.stats.acceptance_rate_per_pos)
            speeds = "".join(f"{tokens / seconds:10.0f}" for seconds in best.values())
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
