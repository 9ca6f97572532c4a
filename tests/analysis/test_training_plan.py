"""Plans of training runs: parameters, memory and time by degrees of parallelism, choice of the degrees."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from dsv4.analysis.activations import POLICIES, layer_activations, received_rows
from dsv4.analysis.degrees import Degrees
from dsv4.analysis.hardware import MACHINES, Precision, cpu
from dsv4.analysis.parameters import count_parameters
from dsv4.analysis.pipeline_stages import balance_layers, layer_costs, stage_sizes
from dsv4.analysis.training_flops import training_flops
from dsv4.analysis.training_memory import Memory, Setting, StageShape, rank_memory, stage_parts
from dsv4.analysis.training_plan import choose_stage, enlarge_stage, plan_stage
from dsv4.analysis.training_weights import optimizer_flops, weights_by_part
from dsv4.config import ModelConfig

FLASH = ModelConfig.preset("flash")
NANO = ModelConfig.preset("nano")
SHORT = StageShape("short", "dense", 4096, 4096, 4096 * 1024, 100, 4096 * 1024 * 100)
LONG = StageShape("long", "sparse", 1 << 20, 1 << 20, 1 << 22, 10, 10 << 22)


def setting(gpus: int, config: ModelConfig = FLASH, precision: Precision = "bf16") -> Setting:
    return Setting(config, MACHINES["H100"], gpus, precision, quantized=False, mtp=True, efficiency=0.5)


@pytest.mark.parametrize("name", ["flash", "pro", "nano"])
def test_parts_hold_every_parameter_once(name: str) -> None:
    config = ModelConfig.preset(name)
    parts = weights_by_part(config)
    assert sum(part.total for part in parts.values()) == count_parameters(config).total_with_mtp
    assert len(parts) == config.num_hidden_layers + config.num_nextn_predict_layers + 2


def test_muons_operations_are_those_of_its_matrices() -> None:
    """One layer more adds its matrices; wq_b counts per head."""
    one = replace(NANO, num_hidden_layers=2, num_hash_layers=2, compress_ratios=(0, 0, 0), num_nextn_predict_layers=1)
    two = replace(one, num_hidden_layers=3, compress_ratios=(0, 0, 0, 0))
    d, heads, c, ql = NANO.hidden_size, NANO.num_attention_heads, NANO.head_dim, NANO.q_lora_rank
    groups, ol, mi = NANO.o_groups, NANO.o_lora_rank, NANO.moe_intermediate_size
    shapes = [(ql, d), (c, d), *[(c, ql)] * heads, *[(ol, heads // groups * c)] * groups, (d, groups * ol)]
    shapes += [(NANO.n_routed_experts, d), *[(mi, d)] * 3 * (NANO.n_routed_experts + NANO.n_shared_experts)]
    wide = NANO.hc_mult * d
    shapes += [((2 + NANO.hc_mult) * NANO.hc_mult, wide)] * 2
    want = 10 * sum(3 * min(s) ** 2 * max(s) + min(s) ** 3 for s in shapes)
    assert optimizer_flops(two) - optimizer_flops(one) == want
    index, size = NANO.index_n_heads, NANO.index_head_dim
    shapes += [*[(c, d)] * 4, (4, 2 * c), *[(size, ql)] * index, (index, d), *[(size, d)] * 4, (4, 2 * size)]
    want = 10 * sum(3 * min(s) ** 2 * max(s) + min(s) ** 3 for s in shapes)  # a window series each
    assert optimizer_flops(replace(two, compress_ratios=(0, 0, 4, 0))) - optimizer_flops(one) == want


def test_sharded_memory_is_a_share_and_policies_keep_less() -> None:
    one, many = (plan_stage(setting(n), SHORT, Degrees(expert=n), "none").memory for n in (1, 64))
    whole = 4 * sum(part.dense - part.adamw for part in weights_by_part(FLASH).values())  # Muon's dense matrices
    for kind, twice in (("masters", whole), ("gradients", whole), ("momenta", 0)):
        assert getattr(one, kind) + twice == pytest.approx(64 * getattr(many, kind))
    small = rank_memory(setting(2, NANO), SHORT, Degrees(data=2), "none", 0, 1)
    rows = 4 * sum(part.dense - part.adamw for part in weights_by_part(NANO).values()) / 2
    assert small.buffers >= 2 * rows  # sent to the owners, and received
    assert one.activations == many.activations  # a rank's row
    kept = [plan_stage(setting(8), SHORT, Degrees(data=8), policy).memory.activations for policy in POLICIES]
    assert kept[0] == max(kept) and kept[-1] == min(kept) and len({*kept}) == len(kept)
    layer = layer_activations(FLASH, 2)
    assert layer.kept("blocks", 2) == 4 * FLASH.hc_mult * FLASH.hidden_size


def test_ranks_hold_what_is_gathered_rounded_and_stored_and_reduce_every_micro_batch() -> None:
    degrees, parts = Degrees(data=2, expert=4), weights_by_part(FLASH)
    dense, experts = (sum(getattr(part, kind) for part in parts.values()) for kind in ("dense", "experts"))

    def memory(**changes: Any) -> Memory:
        return plan_stage(replace(setting(8, precision="fp32"), **changes), SHORT, degrees, "blocks").memory

    whole = dense + experts // 4  # a rank's share of the experts, gathered over the two ranks that hold the same
    assert memory(keep_gathered=True).weights == 4 * whole
    outside = dense - sum(parts[f"layers.{layer}"].dense for layer in range(FLASH.num_hidden_layers))
    layers = FLASH.num_hidden_layers + FLASH.num_nextn_predict_layers
    assert memory().weights == pytest.approx(4 * (outside + 2 * (whole - outside) / layers))
    rounded = sum(part.rounded for part in parts.values()) - experts + experts // 4
    assert 0.5 * whole < rounded < whole
    assert memory(precision="bf16").weights == memory(precision="fp8").weights == memory().weights + 2 * rounded
    assert memory(quantized=True).weights == memory().weights  # layers are rounded where they are gathered
    assert 0.9 * 4 * outside < memory(quantized=True).quantized <= 4 * outside
    alone = rank_memory(replace(setting(1), quantized=True), SHORT, Degrees(), "blocks", 0, 1)
    assert 0.9 * 4 * (dense + experts) < alone.quantized <= 4 * (dense + experts)
    twice = replace(SHORT, batch_tokens=2 * SHORT.batch_tokens)
    once, double = (plan_stage(setting(8), shape, Degrees(data=8), "blocks") for shape in (SHORT, twice))
    assert double.communication == pytest.approx(2 * once.communication)
    kept = plan_stage(replace(setting(8), keep_gathered=True), SHORT, Degrees(data=8), "blocks")
    assert kept.communication == pytest.approx(2 / 3 * once.communication)


def test_a_pipeline_splits_layers_and_waits() -> None:
    flat, split = (plan_stage(setting(8), SHORT, Degrees(data=8 // p, pipeline=p), "blocks") for p in (1, 4))
    assert flat.bubble == 0 and split.bubble == pytest.approx(3 / (split.micro_batches + 3))
    assert split.micro_batches == 512
    assert split.memory.masters == pytest.approx(flat.memory.masters, rel=0.2)  # as many shards in all
    # The first rank has four micro-batches in flight, of a quarter of the layers each.
    first, whole = (rank_memory(setting(8), SHORT, Degrees(pipeline=p, data=8 // p), "blocks", 0, 512) for p in (4, 1))
    assert first.activations == pytest.approx(whole.activations, rel=0.2)


def test_layers_are_balanced_by_cost() -> None:
    sizes = balance_layers([1.0] * 43, 8)
    assert sum(sizes) == 43 and max(sizes) == 6
    assert balance_layers([1.0, 1.0, 1.0, 1.0, 1.0], 2, last=1.0) == [3, 2]
    assert balance_layers([4.0, 1.0, 1.0, 1.0, 1.0], 2) == [1, 4]
    assert sum(balance_layers([1.0] * 61, 16, first=0.3, last=2.0)) == 61
    with pytest.raises(ValueError, match="3 layers in 4 stages; allowed: 1 to 3"):
        balance_layers([1.0] * 3, 4)


@pytest.mark.parametrize(("name", "stages"), [(n, s) for n in ("flash", "pro", "nano") for s in (2, 4, 8)])
def test_stages_are_those_of_training(name: str, stages: int) -> None:
    config = ModelConfig.preset(name)
    if stages > config.num_hidden_layers:
        with pytest.raises(ValueError, match="6 layers in 8 stages; allowed: 1 to 6"):
            stage_parts(setting(stages, config), stages, 0)
        return
    costs, last = layer_costs(config)
    parts = [stage_parts(setting(stages, config), stages, place) for place in range(stages)]
    held = [len([layer for layer in layers if layer < config.num_hidden_layers]) for layers, _ in parts]
    assert held == balance_layers(costs, stages, last=last) and held[-1] < max(held)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    assert [layer for mine, _ in parts for layer in mine] == list(range(layers))


def test_given_stages_take_their_memory() -> None:
    def peak(stages: tuple[int, ...]) -> float:
        return plan_stage(replace(setting(8), stages=stages), SHORT, Degrees(data=4, pipeline=2), "blocks").memory.total

    even = peak(())
    assert peak((33, 10)) > even and peak(tuple(stage_sizes(FLASH, 2))) == even
    assert peak((10, 10, 10, 13)) == even  # of a pipeline of four


def test_time_is_the_models_operations_at_the_rate_reached() -> None:
    plan = plan_stage(setting(1, NANO), SHORT, Degrees(), "none")
    flops = 1024 * training_flops(NANO, (4096,), "dense") + optimizer_flops(NANO)
    assert plan.step_seconds == pytest.approx(flops / (0.5 * MACHINES["H100"].bf16))
    assert plan.mfu < 0.5
    again = plan_stage(setting(1, NANO), SHORT, Degrees(), "blocks")
    assert 1.2 < again.step_seconds / plan.step_seconds < 4 / 3
    assert again.mfu < plan.mfu
    fp8 = plan_stage(setting(1, FLASH, "fp8"), SHORT, Degrees(), "none")
    assert fp8.computation < plan_stage(setting(1), SHORT, Degrees(), "none").computation


def test_context_ranks_share_the_activations_of_a_row_and_receive_its_entries() -> None:
    """More of them hold fewer tokens each; the last one gets the others' entries and index keys."""
    two, four = (plan_stage(setting(4, NANO), LONG, Degrees(context=n, data=4 // n), "blocks").memory for n in (2, 4))
    assert four.activations == pytest.approx(two.activations / 2)
    entries = {4: 64 + 32, 128: 64}  # channels of a CSA layer's, index keys too, and of an HCA layer's
    for layer, ratio in enumerate(NANO.compress_ratios[:4]):
        assert received_rows(NANO, layer, 1 << 20) == ((1 << 20) // ratio * entries[ratio] if ratio else 0)
    tokens = (1 << 20) * sum(one.kept("none", 2) for one in map(partial(layer_activations, NANO), range(7)))
    streams = 4 * NANO.hc_mult * NANO.hidden_size + 4 * NANO.hidden_size  # that a read-out keeps
    received = sum(received_rows(NANO, layer, 1 << 20) for layer in range(7))
    kept = plan_stage(setting(4, NANO), LONG, Degrees(context=4), "none").memory.activations
    assert kept == pytest.approx((tokens + (1 << 21) * streams) / 4 + 3 / 4 * 2 * received)
    alone, cut = (plan_stage(setting(4, NANO), LONG, Degrees(context=n, data=4 // n), "blocks") for n in (1, 4))
    assert cut.communication > alone.communication


def test_a_step_is_whole_rows_of_every_rank() -> None:
    """As training has it (StageSection.size): a plan says so where the recipe's rows are not."""
    with pytest.raises(
        ValueError, match="stage 'long': data 1 x expert 8; allowed: as many as the 4 rows of a step can"
    ):
        plan_stage(setting(8), LONG, Degrees(expert=8), "none")
    with pytest.raises(ValueError, match="data x expert must share the 4 rows of a step evenly"):
        choose_stage(setting(8), LONG, expert=8)
    many = replace(LONG, batch_tokens=72 << 20, tokens=720 << 20)
    plan = plan_stage(setting(64), many, Degrees(expert=64), "blocks")
    assert (plan.micro_batches, plan.shape.batch_tokens, plan.asked_rows, plan.shape.steps) == (1, 64 << 20, 72, 11)
    assert plan.seconds == pytest.approx(plan.step_seconds * 720 / 64)
    exact = plan_stage(setting(64), many, Degrees(expert=8, context=8), "blocks")
    assert (exact.shape, exact.micro_batches) == (many, 9)


def test_more_gpus_are_named_on_which_a_stage_fits() -> None:
    """Four rows leave four expert ranks, so that stages of a pipeline and parts of a row are many."""
    h200 = replace(setting(256), machine=MACHINES["H200"])
    plan = enlarge_stage(h200, LONG)
    assert plan is not None and plan.fits and plan.degrees.ranks in (512, 1024, 2048)
    assert plan.degrees.context >= 32 and plan.degrees.batches <= 4
    assert not choose_stage(replace(h200, gpus=plan.degrees.ranks // 2), LONG).fits
    assert enlarge_stage(h200, LONG, pipeline=1, context=1) is None


def test_chosen_degrees_fit_and_given_ones_stay() -> None:
    assert choose_stage(setting(512), SHORT).fits
    plan = choose_stage(setting(512), LONG)
    assert plan.degrees.ranks == 512 and plan.degrees.context > 1
    assert not plan.fits  # four rows are for four expert ranks at most, whose rounded weights are whole
    given = choose_stage(setting(512), SHORT, "blocks", pipeline=4, expert=8)
    assert (given.degrees.pipeline, given.degrees.expert, given.recompute) == (4, 8, "blocks")
    assert not choose_stage(setting(1), SHORT).fits


def test_replicas_of_one_machine_share_weights() -> None:
    here = replace(setting(2, NANO, "fp32"), machine=cpu(16e9, 1e11), shared_weights=True)
    plan = plan_stage(here, SHORT, Degrees(data=2), "none")
    total = count_parameters(NANO).total_with_mtp
    assert plan.memory.masters == plan.memory.gradients / 2 == 4 * total  # a process's own, and the sum
    assert plan.memory.weights == plan.memory.buffers == plan.communication == 0


@pytest.mark.parametrize(
    "degrees, words",
    [
        (Degrees(data=3), "make 3 ranks; allowed: as many as there are, 8"),
        (Degrees(data=2, expert=6), "make 12 ranks; allowed: as many as there are, 8"),
        (Degrees(pipeline=64), "make 64 ranks"),
    ],
)
def test_degrees_that_do_not_go_together_are_named(degrees: Degrees, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_stage(setting(8), SHORT, degrees, "none")
    with pytest.raises(ValueError, match="cannot be cut for 8 GPUs with data 5"):
        choose_stage(setting(8), SHORT, data=5)
