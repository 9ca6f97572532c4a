"""The machine: description, measured ceilings, and the floors that they give for a model."""

from __future__ import annotations

import os
import platform
import re
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dsv4.analysis.flops import decode_flops
from dsv4.analysis.inventory import StorageLayout, tensor_inventory
from dsv4.analysis.kv import cache_bytes
from dsv4.config import ModelConfig

# Flag of /proc/cpuinfo -> name, widest first: processors with the same name differ in these.
ISAS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
EMULATED_SIZE = 256
FLOPS_EVERY = 64  # positions between two evaluations of the FLOP count, which is smooth between them
Ceilings = dict[str, float]


def hardware() -> dict[str, Any]:
    """CPU model, its widest instruction set of ISAS, cores, memory."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text(encoding="utf-8")
        found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, flags=re.M) for key in ("model name", "flags")}
        name, flags = (match[1] if match else kept for match, kept in zip(found.values(), (name, ""), strict=True))
    isa = next((isa for flag, isa in ISAS.items() if flag in flags.split()), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": name, "isa": isa, "cores": os.cpu_count(), "memory_bytes": memory}


def hardware_slug(found: dict[str, Any]) -> str:
    """File name of a machine's results: "AMD EPYC" with AVX2 and 2 cores -> amd-epyc-avx2-2-cores."""
    plain = re.sub(r"\((?:R|TM)\)|@.*", " ", str(found["cpu"]), flags=re.I)
    return "-".join(re.findall(r"[a-z0-9]+", f"{plain} {found['isa']} {found['cores']} cores".lower()))


def measure_ceilings(megabytes: int, size: int, busy: bool = False) -> Ceilings:
    """Bytes per second (copy counts reads and writes) and FLOP per second of a size^3 product, 2 per multiply-add.

    In fp32 of the faster of torch's product and the native kernel's, which reaches almost twice torch's on some
    processors. busy: per second of processor time.
    """
    import torch

    from dsv4.kernels.linear import linear

    def best(work: Callable[[], object]) -> float:
        timer = time.process_time if busy else time.perf_counter
        return min(timeit.repeat(work, timer=timer, number=1, repeat=4)[1:])

    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    copy, read = best(lambda: target.copy_(source)), best(source.sum)
    found = {"copy_bytes_per_s": 2 * source.nbytes / copy, "read_bytes_per_s": source.nbytes / read}
    # Without bf16 instructions torch emulates them, at least ten times slower than fp32: a small product must do.
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    sides = {torch.float32: size, torch.bfloat16: size if native else min(size, EMULATED_SIZE)}
    for name, (dtype, side) in zip(("fp32", "bf16"), sides.items(), strict=True):
        a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
        products = [partial(torch.mm, a, b), *([partial(linear, a, b)] if dtype == torch.float32 else [])]
        found[f"{name}_flop_per_s"] = 2 * side**3 / min(map(best, products))
    return found


def best(*measured: Ceilings) -> Ceilings:
    """The best of each rate: other work on the machine only lowers it."""
    return {name: max(one[name] for one in measured) for name in measured[0]}


def fastest_product(ceilings: Ceilings) -> float:
    """FLOP per second of the faster matrix product."""
    return max(ceilings["fp32_flop_per_s"], ceilings["bf16_flop_per_s"])


def stored_bytes(config: ModelConfig, layout: StorageLayout) -> int:
    """Bytes of the main model's weights."""
    return sum(spec.num_bytes for spec in tensor_inventory(config, layout) if not spec.name.startswith("mtp."))


def token_bytes(config: ModelConfig, layout: StorageLayout) -> int:
    """Bytes of the main model's weights read per token."""
    always = routed = 0
    for spec in tensor_inventory(config, layout):
        if spec.name.startswith(("mtp.", "embed.")) or spec.component == "tid2eid":
            continue  # embedding and hash table are look-ups of one row
        if ".experts." in spec.name:
            routed += spec.num_bytes
        else:
            always += spec.num_bytes
    return always + routed * config.num_experts_per_tok // config.n_routed_experts


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Operations of a prompt; the head runs for its last token only."""
    head = decode_flops(config, 1).terms["head"]
    body = sum(
        min(FLOPS_EVERY, length + 1 - first) * (decode_flops(config, first + FLOPS_EVERY // 2).raw - head)
        for first in range(1, length + 1, FLOPS_EVERY)
    )
    return body + head


def floor(config: ModelConfig, layout: StorageLayout, measure: str, tokens: int, ceilings: Ceilings) -> float:
    """Best possible value on this machine, in the measure's unit.

    Decode: a token's weights read once. Prefill: the prompt's operations at the rate of the faster matrix product (fp32
    weights: at fp32's). Memory: the stored weights.
    """
    if measure == "peak memory":
        return float(stored_bytes(config, layout))
    if measure.startswith("decode"):
        return ceilings["read_bytes_per_s"] / token_bytes(config, layout)
    rate = ceilings["fp32_flop_per_s"] if layout == "fp32" else fastest_product(ceilings)
    return tokens * rate / prefill_flops(config, tokens)


def kv_bytes(config: ModelConfig, tokens: int, element: int) -> float:
    """Cache bytes by the KV formula, for `element` bytes per channel (4 fp32, 2 BF16, 1 FP8 and FP4 index keys)."""
    found = cache_bytes(config, tokens, "fp8+fp4" if element == 1 else "bf16")
    return float((found.growing + found.windows) * max(element, 2) // 2 + found.states)
