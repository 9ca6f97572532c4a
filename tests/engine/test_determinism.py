"""The same request gives the same tokens and log-probabilities, to the bit, in all circumstances.

Columns of the table in docs/request.md are REQUESTS, rows CIRCUMSTANCES; each row is one test per numerics. Compared is
with each request alone: one row, nothing stored, nothing drafted, steps of any number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.engine import LLM, RequestOutput, SamplingParams
from dsv4.engine.draft_length import FixedLength
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer
from dsv4.model_folder import resolve_model

from .prefixes import STRICT_MKL, assert_nothing_leaks

pytestmark = pytest.mark.skipif(
    backends.native_module() is None and not STRICT_MKL, reason="plain torch rounds by the size of a product"
)
DOCS = Path(__file__).parents[2] / "docs" / "request.md"
NANO = resolve_model(None)
EOS = 1
WORDS = (Path(__file__).parents[2] / "LICENSE").read_text().split()
TEXT = " ".join(random.Random(1).choices(WORDS, k=3000))  # of which the prompts are parts
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]}
Prompts = list[list[int]]
Params = list[SamplingParams]
Circumstance = Callable[[Transformer, Prompts, list[int], Path], list[RequestOutput]]

REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> tokens of the prompt, parameters
    "greedy": (1100, {"temperature": 0.0, "logit_bias": {EOS: -100.0}}),
    "temperature 1": (257, {}),
    "top-k, top-p, min-p": (300, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}),
    "penalties and bias": (131, {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {300: 2.0}}),
    "prompt log-probabilities": (200, {"prompt_logprobs": True}),
    "JSON schema": (127, {"json_schema": SCHEMA, "max_tokens": 30}),
    "stop string": (128, {"stop": "e"}),
    "short": (3, {"temperature": 0.7, "max_tokens": 140, "logit_bias": {EOS: -100.0}}),
}


def params_of(name: str, place: int) -> SamplingParams:
    return SamplingParams(**{"seed": 430 + place, "max_tokens": 20, "logprobs": 3, **REQUESTS[name][1]})


@pytest.fixture(scope="module", params=["float", "shipped"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return dsv4.load(NANO, numerics=request.param).freeze()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    tokenizer = LLM().tokenizer
    assert tokenizer is not None
    return tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def prompts(ids: list[int]) -> Prompts:
    return [ids[97 * i : 97 * i + count] for i, (count, _) in enumerate(REQUESTS.values())]


PARAMS = [params_of(name, i) for i, name in enumerate(REQUESTS)]


def new_llm(model: Transformer, **options: Any) -> LLM:
    return LLM(model, folder=NANO, max_model_len=2048, **options)


def one_by_one(llm: LLM, prompts: Prompts, params: Params) -> list[RequestOutput]:
    return [llm.generate([prompt], param)[0] for prompt, param in zip(prompts, params, strict=True)]


@pytest.fixture(scope="module")
def alone(model: Transformer, prompts: Prompts) -> list[Any]:
    llm = new_llm(model, max_num_seqs=1, enable_prefix_caching=False)
    return [bits(output) for output in one_by_one(llm, prompts, PARAMS)]


def bits(output: RequestOutput) -> tuple[object, ...]:
    return (
        output.token_ids,
        output.text,
        output.logprobs,
        output.top_logprobs,
        output.prompt_logprobs,
        output.finish_reason,
    )


def among_others(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """32 at once, in an order and with neighbours that chance decides."""
    rng = random.Random(1)
    others = [ids[(start := rng.randrange(1500)) : start + rng.randint(1, 400)] for _ in range(32 - len(prompts))]
    batch = [*zip(prompts, PARAMS, strict=True)]
    batch += [(other, SamplingParams(seed=i, max_tokens=rng.randint(1, 60))) for i, other in enumerate(others)]
    order = rng.sample(range(32), 32)
    llm = new_llm(model, max_num_seqs=32)
    outputs = llm.generate([batch[i][0] for i in order], [batch[i][1] for i in order])
    assert_nothing_leaks(llm)
    return [outputs[order.index(i)] for i in range(len(prompts))]


def in_chunks(tokens: int, seqs: int) -> Circumstance:
    def run(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
        return new_llm(model, max_num_batched_tokens=tokens, max_num_seqs=seqs).generate(prompts, PARAMS)

    return run


def after_preemption(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """Each gives way several times, while its prompt is read and later."""
    llm = new_llm(model, max_num_batched_tokens=150)
    core, rng = llm.core, random.Random(2)
    requests = [core.new_request(prompt, param) for prompt, param in zip(prompts, PARAMS, strict=True)]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
        running = core.scheduler.running
        if running and rng.random() < 0.4:
            core.scheduler._preempt(rng.choice(list(running)))
    assert core.scheduler.cache_manager.num_preemptions > 10
    return [request.output for request in requests]


def from_memory(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """The same prompts again."""
    llm = new_llm(model)
    llm.generate(prompts, PARAMS)
    outputs = llm.generate(prompts, PARAMS)
    assert sum(output.cached_tokens for output in outputs) > 0
    return outputs


def from_other_prompts(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """After prompts that have the first tokens in common, and all of them at once."""
    llm = new_llm(model, snapshot_interval=128)
    llm.generate([prompt[: 2 * len(prompt) // 3] + ids[:90] for prompt in prompts], SamplingParams(max_tokens=3))
    outputs = llm.generate(prompts, PARAMS)
    assert sum(output.cached_tokens > 0 for output in outputs) >= 3, "of those that have a whole block in common"
    return outputs


def on_two_threads(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return new_llm(model).generate(prompts, PARAMS)
    finally:
        torch.set_num_threads(threads)


def from_disk(policy: str) -> Circumstance:
    def run(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
        """By an engine that starts on the folder of one that has ended."""
        options = {"cache_dir": path, "cache_window": policy, "snapshot_interval": 128}
        first = new_llm(model, **options)
        first.generate(prompts, PARAMS)
        first.close()
        llm = new_llm(model, **options)
        outputs = llm.generate(prompts, PARAMS)
        assert llm.disk_cache is not None and llm.disk_cache.stats.num_hits >= (1 if policy == "zero" else 3)
        llm.close()
        return outputs

    return run


def after_a_restart(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """What another process has left on the disk."""
    job = get_context("spawn").Process(target=fill, args=(model.numerics, prompts, path))
    job.start()
    job.join()
    assert job.exitcode == 0
    llm = new_llm(model, cache_dir=path)
    outputs = llm.generate(prompts, PARAMS)
    assert llm.disk_cache is not None and llm.disk_cache.stats.num_hits >= 1
    llm.close()
    return outputs


def fill(numerics: str, prompts: Prompts, path: Path) -> None:
    torch.set_num_threads(1)
    llm = new_llm(dsv4.load(NANO, numerics=numerics).freeze(), cache_dir=path)
    llm.generate(prompts, PARAMS)
    llm.close()


def drafting(length: int) -> Circumstance:
    def run(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
        llm = new_llm(model, speculate=length)
        draft_always(llm, length)
        outputs = llm.generate(prompts, PARAMS)
        assert llm.core.speculator is not None and llm.core.speculator.stats.num_accepted_tokens > 10
        return outputs

    return run


def draft_always(llm: LLM, length: int) -> None:
    assert llm.core.speculator is not None
    llm.core.speculator.lengths = FixedLength(length)


def all_together(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """From the disk, drafting, in small chunks, in few pages, twice."""
    options = {"cache_dir": path, "speculate": 2, "num_pages": 12, "max_num_batched_tokens": 50, "max_model_len": 1536}
    for _ in range(2):
        llm = LLM(model, folder=NANO, **options)
        draft_always(llm, 2)
        outputs = llm.generate(prompts, PARAMS)
        assert_nothing_leaks(llm)
        llm.close()
    return outputs


def with_a_loose_constraint(model: Transformer, prompts: Prompts, ids: list[int], path: Path) -> list[RequestOutput]:
    """Under a constraint that allows all that they write, which is text: it knows no other bytes."""
    params = [param if param.is_constrained else replace(param, regex="(?s:.*)") for param in PARAMS]
    outputs = new_llm(model).generate(prompts, params)
    assert not any("\ufffd" in output.text for output in new_llm(model).generate(prompts, PARAMS)), "take other seeds"
    return outputs


CIRCUMSTANCES: dict[str, Circumstance] = {
    "among 31 others": among_others,
    "1 token per step": in_chunks(1, 1),
    "7 tokens per step": in_chunks(7, 3),
    "129 tokens per step": in_chunks(129, 8),
    "2 threads": on_two_threads,
    "preempted": after_preemption,
    "prefix in memory": from_memory,
    "prefix of another": from_other_prompts,
    "disk, full": from_disk("full"),
    "disk, periodic": from_disk("periodic:128"),
    "disk, zero": from_disk("zero"),
    "restarted": after_a_restart,
    "1 draft": drafting(1),
    "3 drafts": drafting(3),
    "loose constraint": with_a_loose_constraint,
    "all together": all_together,
}


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_circumstances_change_no_bit(
    circumstance: str, model: Transformer, prompts: Prompts, ids: list[int], alone: list[Any], tmp_path: Path
) -> None:
    outputs = CIRCUMSTANCES[circumstance](model, prompts, ids, tmp_path)
    for name, output, want in zip(REQUESTS, outputs, alone, strict=True):
        assert bits(output) == want, f"{name}, {circumstance}"


def test_the_documented_table_has_these_cells() -> None:
    rows = [["", *REQUESTS], ["---"] * (1 + len(REQUESTS))]
    rows += [[name, *["✓"] * len(REQUESTS)] for name in CIRCUMSTANCES]
    table = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    assert table in DOCS.read_text(), f"docs/request.md should have\n{table}"
