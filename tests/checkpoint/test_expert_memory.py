"""Routed experts within a budget of memory: the same bits, the budget kept page by page, errors in numbers."""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks.harness.random_checkpoint import write_random_checkpoint
from benchmarks.harness.residency import drop_files, resident_bytes
from dsv4.checkpoint import CheckpointError, load_model
from dsv4.checkpoint.expert_memory import PAGE_BYTES, ExpertMemory, ExpertMemoryError, limit_experts
from dsv4.config import ModelConfig
from dsv4.engine import LLM, SamplingParams
from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.native_backend import NativeBackend
from dsv4.model.transformer import Transformer

native = backends.native_module()
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops parts of a mapped file on demand"),
    pytest.mark.skipif(native is None, reason="the native kernels are not built"),
]

# Two hash layers, a CSA and an HCA layer and an MTP block, each with 16 experts of about 210 KB: 17 MB.
CONFIG = ModelConfig(
    vocab_size=97, hidden_size=256, num_hidden_layers=4, num_hash_layers=2, num_nextn_predict_layers=1,
    num_attention_heads=2, head_dim=32, qk_rope_head_dim=16, q_lora_rank=32, o_groups=1, o_lora_rank=32,
    compress_ratios=(0, 4, 128, 4, 0), index_n_heads=2, index_head_dim=32, index_topk=8,
    n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=512, routed_scaling_factor=1.5,
)  # fmt: skip
IDS = torch.randint(0, CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("experts") / request.param
    layout = "official" if request.param == "fp4" else "official-base"
    write_random_checkpoint(replace(CONFIG, expert_dtype=request.param), place, 1, layout)
    drop_files(place)  # written to the disk: only then can pages be dropped
    return place


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def outputs(model: Transformer, ids: Tensor = IDS) -> list[Tensor]:
    """Logits of a batch in one piece, then of single tokens, then an MTP block's streams."""
    cache = model.new_cache(ids.shape[0], 64)
    found = [model(ids[:, :-8], cache=cache)]
    found += [model(ids[:, i : i + 1], cache=cache) for i in range(ids.shape[1] - 8, ids.shape[1])]
    single = model.new_cache(1, 64)
    found += [model(ids[:1, i : i + 1], cache=single) for i in range(8)]
    batch = RaggedBatch.pack(ids[:1].tolist())
    streams = model.forward_ragged(batch)
    return [*found, model.mtp_forward(streams, ids[0].roll(-1), batch)]


def limited(folder: Path, share: float) -> tuple[Transformer, ExpertMemory]:
    """A model with a share of its experts in memory; 0: the least."""
    model = load_model(folder)
    memory = limit_experts(model, 1 << 40)
    return model, limit_experts(model, max(memory.least, int(memory.total_bytes * share)))


@pytest.mark.parametrize("isa", native.isas() if native is not None else [])
@pytest.mark.parametrize("share", [0, 0.5, 2])
def test_the_bits_are_those_without_a_budget(folder: Path, share: float, isa: str) -> None:
    kernels = backends.native_module()
    assert kernels is not None
    before = kernels.selected()
    kernels.select(isa)
    try:
        want = outputs(load_model(folder))
        got = outputs(limited(folder, share)[0])
    finally:
        kernels.select(before)
    assert all(map(torch.equal, got, want))


def test_the_bits_do_not_depend_on_threads_that_share_a_model(folder: Path) -> None:
    want, (model, _) = outputs(load_model(folder)), limited(folder, 0.2)
    got: list[list[Tensor]] = []

    def compute() -> None:
        with torch.no_grad():
            got.append(outputs(model))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3 and all(all(map(torch.equal, found, want)) for found in got)


@pytest.mark.parametrize("share", [0, 0.3])
def test_never_more_than_the_budget_is_mapped_or_cached(folder: Path, share: float) -> None:
    """Pages counted by the system between layers; a page that also holds another weight may stay."""
    shared = 2 * len(CONFIG.compress_ratios) * PAGE_BYTES
    model, memory = limited(folder, share)
    backend = model.backend
    assert isinstance(backend, NativeBackend) and resident_bytes(memory.rows)[0] <= shared
    cache, seen = model.new_cache(2, 64), [0, 0]
    for ids in (IDS[:, :20], *IDS[:, 20:40].split(1, dim=1)):
        batch = RaggedBatch.pack(ids.tolist(), starts=cache.lengths)
        cache.reserve(batch.slots, batch.starts, batch.lengths)
        streams = np.empty((batch.num_tokens, CONFIG.hc_mult, CONFIG.hidden_size), dtype=np.float32)
        inputs = backend._inputs(batch, cache, batch.token_ids)
        for layer in range(CONFIG.num_hidden_layers):
            backend.kernels.forward(backend.handle, *inputs, layer, layer + 1, layer == 0, streams)
            seen = list(map(max, seen, resident_bytes(memory.rows)))
        cache.advance(batch.slots, batch.lengths)
    stats = memory.stats()
    assert 0 < stats.peak_bytes <= memory.budget and stats.resident_bytes <= memory.budget and stats.evictions > 0
    assert 0 < seen[0] <= memory.budget + shared
    if _drops_page_cache(folder):
        assert seen[1] <= memory.budget + shared


def _drops_page_cache(folder: Path) -> bool:
    """False on a file system that lies in memory."""
    file = next(folder.glob("*.safetensors"))
    kinds = dict(line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
    mounts = [mount for mount in kinds if Path(mount) in file.resolve().parents]
    return kinds[max(mounts, key=len)] not in ("tmpfs", "ramfs", "overlay")


def test_counts_of_a_first_and_of_a_repeated_forward(folder: Path) -> None:
    """With all experts in memory nothing is read twice; experts of hash layers are read before they are needed."""
    model, memory = limited(folder, 2)
    model(IDS)
    first = memory.stats()
    table = model.layers[0].ffn.gate.tid2eid
    assert isinstance(table, Tensor)
    hashed = len(table[IDS.flatten()].unique()) + len(model.layers[1].ffn.gate.tid2eid[IDS.flatten()].unique())
    assert first.read_ahead_hits == hashed and first.misses > 0 and first.evictions == 0
    model(IDS)
    second = memory.stats()
    assert second.misses == first.misses and second.bytes_read == first.bytes_read == second.resident_bytes
    assert second.hits - first.hits == first.hits + first.misses and second.read_ahead_hits == hashed


def test_a_small_budget_reads_again_and_reads_ahead_within_half_of_it(folder: Path) -> None:
    model, memory = limited(folder, 0)
    for i in range(20):
        model(IDS[:1, i : i + 1])
    stats = memory.stats()
    assert stats.evictions > 0 and stats.misses > stats.hits >= stats.read_ahead_hits > 0
    claims = stats.hits + stats.misses
    assert claims <= 20 * CONFIG.num_hidden_layers * CONFIG.num_experts_per_tok
    assert stats.bytes_read >= stats.misses * memory.total_bytes // memory.num_experts * 0.9


def test_the_limit_survives_a_refresh_and_ends_with_stored_experts(folder: Path) -> None:
    model, memory = limited(folder, 0.3)
    model.refresh()(IDS)
    assert memory.stats().misses > 0
    assert getattr(copy.deepcopy(model), "expert_memory", None) is None
    want = model(IDS)
    model.requires_grad_(True)
    model.freeze()
    before = memory.stats()
    assert torch.allclose(model(IDS), want, atol=1e-4) and memory.stats() == before


def test_calls_that_the_reference_computes_say_once_that_they_keep_no_budget(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4.notices._told", set())
    model, memory = limited(folder, 0)
    for _ in range(2):
        model.forward_ragged(RaggedBatch.pack(IDS[:1, :4].tolist()), aux=AuxLosses())
    assert memory.stats().misses == 0
    assert len([line for line in caplog.messages if "expert_memory is not kept" in line]) == 1


def test_too_small_a_budget_names_the_least(folder: Path) -> None:
    model = load_model(folder)
    with pytest.raises(ExpertMemoryError) as caught:
        limit_experts(model, 1000)
    found = re.fullmatch(
        r"expert_memory is 1000 bytes; allowed: (\d+) or more, which the 3 experts of one token in one layer take",
        str(caught.value),
    )
    assert found is not None
    least = int(found[1])
    assert limit_experts(model, least).least == least
    with pytest.raises(ExpertMemoryError):
        limit_experts(model, least - 1)


def test_experts_in_memory_of_their_own_are_refused(folder: Path) -> None:
    with pytest.raises(ExpertMemoryError, match="float copies in memory"):
        limit_experts(load_model(folder, weights="widened"), 1 << 30)
    with pytest.raises(ExpertMemoryError, match="copied into memory; allowed: None, or the native kernels"):
        LLM(folder, expert_memory=1 << 30, dtype="bfloat16")
    with pytest.raises(ExpertMemoryError, match="the model is a Stranger"):
        LLM(type("Stranger", (), {"config": CONFIG})(), expert_memory=1 << 30)


def test_replaced_files_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    model = load_model(tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    shutil.copy(file, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    with pytest.raises(CheckpointError, match="found another file"):
        limit_experts(model, 1 << 30)


def test_an_engine_with_a_budget_gives_the_tokens_of_one_without(folder: Path) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=True)
    prompts = [IDS[0, :20].tolist(), IDS[1, :7].tolist(), IDS[1].tolist()]
    want = LLM(folder).generate(prompts, params)
    llm = LLM(folder, expert_memory=3 << 20)
    got = llm.generate(prompts, params)
    assert [(o.token_ids, o.logprobs) for o in got] == [(o.token_ids, o.logprobs) for o in want]
    assert llm.expert_memory is not None and llm.expert_memory.stats().peak_bytes <= 3 << 20
    assert re.fullmatch(
        r"80 routed experts, 0\.0\d GB, stay in their files; 0\.00 GB \(\d+%\) of them are kept in memory, .*",
        llm.expert_memory.describe(),
    )
    again = LLM(llm.core.runner.model, expert_memory=None)
    assert again.expert_memory is llm.expert_memory, "a model object keeps its limit"


def test_rows_cover_every_byte_of_every_expert(folder: Path) -> None:
    model, memory = limited(folder, 2)
    pages = {(layer, expert): set() for layer, expert in np.unique(memory.rows[:, :2], axis=0).tolist()}
    for layer, expert, first, size, _, _ in memory.rows.tolist():
        assert first % PAGE_BYTES == size % PAGE_BYTES == 0
        pages[layer, expert] |= set(range(first, first + size, PAGE_BYTES))
    assert len(pages) == memory.num_experts == 80
    for layer, block in enumerate((*model.layers, *model.mtp)):
        for w in ("w1", "w2", "w3"):
            for expert, matrix in enumerate(getattr(block.ffn.experts, w).matrices):
                for part in (matrix.codes, matrix.scales):
                    first, last = part.data_ptr(), part.data_ptr() + part.nbytes
                    needed = range(first - first % PAGE_BYTES, last, PAGE_BYTES)
                    assert pages[layer, expert].issuperset(needed)
