"""A model's memory is known before it is loaded, and reported in numbers: made-up machines, real models."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.analysis.kv import KvFormat, entry_bytes, index_key_bytes
from dsv4.cache import Cache
from dsv4.cache.formats import CacheDtype
from dsv4.checkpoint.folder import Checkpoint
from dsv4.config import ModelConfig, nano_path
from dsv4.engine import LLM, CapacityError, SamplingParams, loading
from dsv4.engine.capacity import (
    LoadPlan,
    Need,
    cache_bytes_of,
    check_fit,
    kept_stream_bytes,
    need_of,
    total_need,
    ways_out,
)
from dsv4.engine.config import EngineConfig
from dsv4.engine.machine import Memory, host_memory, memory_limit
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredWeight
from dsv4.server.run import serve

GB = 10**9
CPU = torch.device("cpu")
FLASH = LoadPlan(ModelConfig.preset("flash"), "official", False, 4, 8, 131072)


def memory(available: float, total: float = 64) -> Memory:
    return Memory(int(available * GB), int(total * GB), "this machine")


def nano_plan(itemsize: int, keeps_stored: bool) -> LoadPlan:
    with Checkpoint(nano_path()) as checkpoint:
        return LoadPlan(checkpoint.config, checkpoint.layout, keeps_stored, itemsize, 2, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_weights_take_what_is_said(dtype: torch.dtype) -> None:
    model = dsv4.load(nano_path(), dtype=dtype, weights="widened")
    need = need_of(nano_plan(dtype.itemsize, False))
    assert need.copied == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) and need.mapped == 0


def test_stored_weights_take_what_is_said() -> None:
    model = dsv4.load(nano_path(), weights="stored")
    mapped = copied = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, StoredWeight):
            mapped += tensor.stored_bytes
        else:
            copied += tensor.nbytes
    need = need_of(nano_plan(4, True))
    assert (need.mapped, need.copied) == (mapped, copied)


FORMATS: list[tuple[CacheDtype, KvFormat]] = [
    (torch.float32, "fp32"), (torch.bfloat16, "bf16"), ("shipped", "fp8+fp4")
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "kv_format"), FORMATS)
def test_the_cache_takes_what_is_said(dtype: CacheDtype, kv_format: KvFormat) -> None:
    config = ModelConfig.preset("nano")
    size = Cache(config, 2, 1000, CPU, dtype).num_bytes()
    need = need_of(replace(nano_plan(4, False), config=config, kv_format=kv_format))
    blank_rows = sum(
        entry_bytes(config, kv_format) + (index_key_bytes(config, kv_format) if kind.has_indexer else 0)
        for kind in map(config.compression, range(config.num_hidden_layers))
        if kind.ratio
    )
    assert need.state == size["window"] + size["state"]
    assert 2 * need.full_request == size["entries"] + size["index_keys"] - blank_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_streams_that_the_mtp_block_reads_are_counted(dtype: torch.dtype) -> None:
    plan = nano_plan(dtype.itemsize, False)
    cache = Cache(plan.config, 2, 1000, CPU, dtype)
    before = cache.live_bytes(2)
    streams = cache.keep_streams(dtype).streams.nbytes
    assert need_of(replace(plan, speculates=True)).state == need_of(plan).state + streams
    assert cache.live_bytes(2) == before | {"state": before["state"] + streams}
    assert kept_stream_bytes(plan.config, dtype.itemsize) * 2 == streams


def test_an_engine_that_speculates_leaves_them_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "host_memory", lambda: Memory(100_000_000, GB, "this machine"))
    plain, speculating = (LLM(speculate=count) for count in (0, 2))
    fewer = (plain.cache_size.num_pages - speculating.cache_size.num_pages) * cache_bytes_of(plain.config, "fp32")[1]
    assert fewer == pytest.approx(0.9 * 8 * kept_stream_bytes(plain.config, 4), rel=0.1)


def test_a_model_that_cannot_be_loaded_is_told_with_numbers_and_ways_out() -> None:
    words = r"flash needs 1164.0 GB of memory to start \(weights 1163.8 GB, state of 8 requests 0.2 GB\)"
    with pytest.raises(CapacityError, match=words) as caught:
        check_fit("flash", need_of(FLASH), memory(22), ways_out(FLASH, memory(22), "kernels: reference, because x"))
    text = str(caught.value)
    assert "22.0 GB of the 64.0 GB of this machine are available" in text
    assert "bfloat16) needs 582.1 GB, which does not fit either" in text
    assert "native kernels on the CPU in float32 (kernels: reference, because x)" in text and "159.4 GB" in text
    assert "bfloat16) needs 582.1 GB, which fits" in ways_out(FLASH, memory(600), "")[0]


def test_one_request_at_a_time_is_a_way_out_where_states_are_large() -> None:
    plan = replace(nano_plan(4, True), max_num_seqs=10_000)
    need = need_of(plan)
    little = Memory(need.at_start // 2, GB, "this machine")
    assert any("--max-num-seqs 1" in way for way in ways_out(plan, little, ""))


def test_with_expert_memory_the_budget_counts_in_place_of_the_experts() -> None:
    plan = replace(FLASH, keeps_stored=True)
    whole, limited = need_of(plan), need_of(replace(plan, expert_memory=8 * GB))
    assert whole.experts > 140 * GB and limited.mapped == whole.mapped - whole.experts + 8 * GB
    assert limited.at_start == whole.at_start
    assert need_of(replace(plan, expert_memory=1 << 50)).mapped == whole.mapped
    assert not any("weights" in line for line in check_fit("flash", limited, memory(64), []))
    (warning, *_) = check_fit("flash", limited, memory(12), [])
    assert re.search(r"the weights take \d+\.\d GB with 8\.0 GB of experts \(expert_memory\), and 12\.0 GB", warning)
    (warning, *_) = check_fit("flash", whole, memory(64), [])
    assert re.search(r"which is slow; expert_memory \(--expert-memory\) of up to \d+\.\d GB bounds", warning)


def test_stored_weights_larger_than_memory_are_a_warning() -> None:
    plan = replace(FLASH, keeps_stored=True)
    (warning,) = check_fit("flash", need_of(plan), memory(22), [])
    assert "the weights are 159.4 GB as stored" in warning and "which is slow" in warning
    assert check_fit("flash", need_of(plan), memory(200), []) == []


def test_a_cache_that_may_not_fit_is_a_warning_with_what_does() -> None:
    need = Need(mapped=0, copied=10 * GB, state=GB, page=GB // 100, pages=1024, rows=8)
    (warning,) = check_fit("m", need, memory(12), [])
    assert "the cache of 8 requests of 131072 tokens takes 81.9 GB, and 1.0 GB are left" in warning
    assert "enough for 12800 tokens" in warning


def test_a_folder_that_cannot_fit_is_refused_before_it_is_loaded(monkeypatch) -> None:
    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "host_memory", lambda: Memory(1000, GB, "the cgroup limit of this process"))
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", load_model)
        for start in (LLM, lambda: serve(port=0, engine_process=False)):
            with pytest.raises(CapacityError, match=r"nano needs \d+.\d MB of memory to start .* the cgroup limit"):
                start()
    assert LLM(check_memory=False).generate("1, 2", SamplingParams(max_tokens=1))[0].token_ids


def test_mapped_weights_larger_than_memory_still_load(monkeypatch, caplog) -> None:
    if backends.native_module() is None:
        pytest.skip("the native kernels are not built")
    need = need_of(replace(nano_plan(4, True), max_num_seqs=1, max_model_len=128))
    monkeypatch.setattr(loading, "host_memory", lambda: Memory(need.at_start + need.page, GB, "this machine"))
    with caplog.at_level(logging.WARNING, "dsv4"):
        llm = LLM(max_num_seqs=1, max_model_len=128)
    assert "which is slow" in caplog.text
    assert llm.generate("1, 2", SamplingParams(max_tokens=1))[0].token_ids


def test_a_system_that_does_not_tell_its_memory_is_no_obstacle(monkeypatch) -> None:
    monkeypatch.setattr(loading, "host_memory", lambda: None)
    loading.check_capacity([nano_path()], EngineConfig(max_model_len=1 << 20))


# Memory of the machine: /proc and cgroup files as on Linux.


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = (
    "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:   10000000 kB\nHugePages_Total:       0\n"
)
STAT = "anon 5000\nactive_file 300\ninactive_file 400\ntotal_active_file 30\ntotal_inactive_file 40\n"


def test_a_machine_without_cgroups_has_what_meminfo_says(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO})
    assert host_memory(root) == Memory(10_240_000_000, 16_384_000_000, "this machine")
    assert host_memory(tmp_path / "nowhere") is None
    assert memory_limit(root) == 16_384_000_000 and memory_limit(tmp_path / "nowhere") is None


@pytest.mark.parametrize("folder", ["a/b", "a", ""])
def test_a_version_2_limit_of_the_group_or_of_one_above_counts(tmp_path: Path, folder: str) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}
    limit = {"memory.max": "10000\n", "memory.current": "4000\n", "memory.stat": STAT}
    files |= {f"sys/fs/cgroup/{folder}/{name}": text for name, text in limit.items()}
    found = host_memory(tree(tmp_path, files))
    assert found == Memory(6700, 10_000, "the cgroup limit of this process")
    assert memory_limit(tmp_path) == 10_000


def test_a_version_1_limit_counts(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/docker/1\n"}
    # Inside a container the group's own path is missing: its files are at the mount point.
    limit = {"memory.limit_in_bytes": "9000", "memory.usage_in_bytes": "4000", "memory.stat": STAT}
    files |= {f"sys/fs/cgroup/memory/{name}": text for name, text in limit.items()}
    assert host_memory(tree(tmp_path, files)) == Memory(5070, 9000, "the cgroup limit of this process")


def test_no_limit_leaves_what_the_machine_has(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/\n0::/\n"}
    files |= {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
    files |= {"sys/fs/cgroup/memory/memory.usage_in_bytes": "1", "sys/fs/cgroup/memory.max": "max"}
    found = host_memory(tree(tmp_path, files))
    assert found is not None and found.owner == "this machine"


# The dtype.


def test_auto_is_float32_on_the_cpu_and_bfloat16_on_a_gpu() -> None:
    assert loading.resolve_dtype("auto", "cpu") == torch.float32
    assert loading.resolve_dtype("auto", "cuda:1") == torch.bfloat16
    assert loading.resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert loading.resolve_dtype(torch.float16, "cpu") == torch.float16
    with pytest.raises(ValueError, match="dtype is 'fp8'; allowed: auto, bfloat16, float32"):
        LLM(dtype="fp8")


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_a_bfloat16_engine_answers_near_the_float32_one(numerics: str) -> None:
    """End to end: load, chunked prefill, batched decode. Matrices and cache are bfloat16, norms are not."""
    exact = LLM(numerics=numerics)
    half = LLM(dtype="bfloat16", numerics=numerics, max_num_batched_tokens=50)
    assert exact.prompts is not None and exact.tokenizer is not None
    prompts = ["The cat's owner may look up words in the library, " * 8 + "The", "Sort these numbers: 12, 7, 2024."]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=5)
    for want, got in zip(exact.generate(prompts, params), half.generate(prompts, params), strict=True):
        assert got.token_ids[0] in [token for token, _ in want.top_logprobs[0]]
        assert abs(got.logprobs[0] - want.logprobs[0]) < 0.3
    alone = LLM(dtype="bfloat16", numerics=numerics).generate(prompts[1], params)[0]
    assert alone.token_ids == half.generate(prompts, params)[1].token_ids
    model = half.core.runner.model
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}  # type: ignore[attr-defined]
    stored = {"float": torch.bfloat16, "shipped": torch.uint8}
    assert half.core.runner.cache.layers[-1].window.dtype == stored[numerics]
    assert model.layers[0].attn_norm.weight.dtype == torch.float32  # type: ignore[attr-defined]


def test_models_that_are_served_together_are_counted_together(monkeypatch) -> None:
    need = need_of(replace(nano_plan(4, backends.native_module() is not None), max_num_seqs=8, max_model_len=4096))
    both = total_need([need, need])
    assert (both.at_start, both.mapped, both.rows) == (2 * need.at_start, 2 * need.mapped, need.rows)
    assert both.full_request == pytest.approx(2 * need.full_request, rel=1e-6) and total_need([need]) == need
    monkeypatch.setattr(loading, "host_memory", lambda: Memory(int(need.at_start * 1.5), GB, "this machine"))
    config = EngineConfig(max_num_seqs=8, max_model_len=4096)
    loading.check_capacity([nano_path()], config)
    with pytest.raises(CapacityError, match="nano.*nano needs"):
        loading.check_capacity([nano_path()] * 2, config)
