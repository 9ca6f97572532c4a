"""Plans of runs that train adapters, beside what such runs keep, compute and take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv4.analysis.activations import Recompute
from dsv4.analysis.adapters import Adapters
from dsv4.analysis.degrees import Degrees
from dsv4.analysis.hardware import MACHINES, cpu
from dsv4.analysis.inventory import checkpoint_bytes
from dsv4.analysis.training_flops import Phase, training_flops
from dsv4.analysis.training_memory import Memory, Setting, StageShape, rank_memory
from dsv4.analysis.training_plan import plan_stage
from dsv4.checkpoint import save_model
from dsv4.cli import main
from dsv4.commands.plan import CPU
from dsv4.config import nano_path
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer
from dsv4.training.gradient import Work, compute_gradient, pack_batch
from dsv4.training.lora import load_adapted, planned
from dsv4.training.lora_settings import DEFAULT_TARGETS, LoraSettings
from dsv4.training.losses import LossWeights

from .test_prediction import WIDER, LiveTensors
from .tiny_training import Rows, draw_documents, make_model

ALL = (*DEFAULT_TARGETS, "compressor", "indexer", "head")
WORK = Work(0, 0, LossWeights(), quantized=False, attention="dense")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    model, _ = make_model(**WIDER)
    save_model(model, model.config, folder)
    return folder


def load(base: Path, rank: int, targets: tuple[str, ...]) -> tuple[Transformer, Adapters]:
    """A model with adapters, and these as plans know them."""
    settings = LoraSettings(rank, targets=targets)
    model = load_adapted(base, settings, torch.device("cpu"), torch.Generator().manual_seed(1))
    return model, planned(settings, "adamw", model.config)


@pytest.mark.parametrize(
    "targets, rank, policy, phase",
    [
        (DEFAULT_TARGETS, 2, "none", "sparse"),
        (DEFAULT_TARGETS, 16, "none", "dense"),
        (DEFAULT_TARGETS, 16, "sublayers", "sparse"),
        (DEFAULT_TARGETS, 16, "blocks", "sparse"),
        (("attention",), 16, "experts", "sparse"),
        (("experts",), 16, "attention", "sparse"),
        (ALL, 16, "none", "sparse"),
        (("*",), 16, "none", "sparse"),
    ],
)
def test_most_bytes_of_a_steps_live_tensors_are_predicted(
    targets: tuple[str, ...], rank: int, policy: Recompute, phase: Phase, base: Path
) -> None:
    """And the numbers that are trained are those of the plan, to the last one."""
    if backends.native_module() is None:
        pytest.skip("the formulas are those of the native kernels")
    model, adapters = load(base, rank, targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == adapters.numbers()
    tokens = 1024
    batch = pack_batch(Rows(draw_documents(1, tokens)), torch.device("cpu"))
    with LiveTensors(trained) as live:
        compute_gradient(model, [batch], Work(0, 0, LossWeights(), False, attention=phase, recompute=policy))
    shape = StageShape("one", phase, tokens, tokens, tokens, 1, tokens)
    setting = Setting(
        model.config, cpu(1e9, 1e9), 1, "fp32", quantized=False, mtp=True, efficiency=1.0, adapters=adapters
    )
    memory = rank_memory(setting, shape, Degrees(), policy, 0, 1)
    assert live.most == pytest.approx(memory.activations + memory.working, rel=0.1)
    assert (memory.masters, memory.gradients, memory.momenta) == tuple(n * adapters.numbers() for n in (4, 4, 8))


def test_operations_are_fewer_by_those_that_torch_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the reference; of attention it computes more than is visible, in all models alike. The embedding learns as
    well, since the input of the first layer would have no gradient else, and that of every other layer has one."""
    monkeypatch.setenv("DSV4_KERNELS", "reference")
    monkeypatch.setattr(backends, "_choice", None)
    tokens = 32
    batch = pack_batch(Rows(draw_documents(1, tokens)), torch.device("cpu"))

    def count(model: Transformer) -> int:
        with FlopCounterMode(display=False) as counter:
            compute_gradient(model, [batch], WORK)
        return counter.get_total_flops()

    full, _ = make_model(**WIDER, compress_ratios=(0, 4, 4, 0))  # windows of 128 would take as many tokens
    save_model(full, full.config, tmp_path / "base")
    counted, predicted = count(full), training_flops(full.config, (tokens,), "dense")
    for rank, targets in ((16, DEFAULT_TARGETS), (16, ALL), (2, ("*",))):
        model, adapters = load(tmp_path / "base", rank, targets)
        model.embed.weight.requires_grad_(True)
        fewer = predicted - training_flops(full.config, (tokens,), "dense", adapters=adapters)
        assert counted - count(model) == pytest.approx(fewer, abs=1e-3 * counted), targets


def test_indexers_without_adapters_have_no_backward_and_the_optimizer_is_of_the_adapters(base: Path) -> None:
    model, adapters = load(base, 4, DEFAULT_TARGETS)
    _, with_indexer = load(base, 4, (*DEFAULT_TARGETS, "indexer"))
    flops = [training_flops(model.config, (300,), adapters=one) for one in (adapters, with_indexer)]
    assert flops[1] > flops[0] and not adapters.indexer and with_indexer.indexer
    assert adapters.optimizer_flops == 0
    muon = planned(LoraSettings(4), "muon", model.config)
    shape = StageShape("one", "sparse", 256, 256, 256, 1, 256)
    settings = [
        Setting(model.config, MACHINES["H100"], 1, "bf16", False, True, 1.0, adapters=one) for one in (adapters, muon)
    ]
    one, other = (plan_stage(setting, shape, Degrees(), "none") for setting in settings)
    assert other.memory.momenta == one.memory.momenta / 2
    assert other.computation - one.computation == pytest.approx(muon.optimizer_flops / MACHINES["H100"].bf16)


def test_a_frozen_head_has_no_gradient(base: Path) -> None:
    config = replace(load(base, 2, ("head",))[0].config, vocab_size=50_000)
    shape = StageShape("one", "sparse", 256, 256, 256, 1, 256)

    def memory(adapters: Adapters | None) -> Memory:
        setting = Setting(config, cpu(1e9, 1e9), 1, "fp32", False, True, 1.0, adapters=adapters)
        return rank_memory(setting, shape, Degrees(), "none", 0, 1)

    targets = (DEFAULT_TARGETS, ALL)
    frozen, adapted = (memory(planned(LoraSettings(2, targets=names), "adamw", config)) for names in targets)
    everything = memory(None)
    head = 4 * config.vocab_size * config.hidden_size
    read_outs = 2  # of the main model and the MTP block
    assert everything.working == adapted.working == frozen.working + read_outs * head
    assert adapted.activations - frozen.activations > read_outs * head, "W + B A of each is kept"


def test_ranks_hold_their_stage_and_their_experts_adapters() -> None:
    config = make_model(**WIDER)[0].config
    adapters = planned(LoraSettings(4, targets=("attention", "experts")), "adamw", config)
    alone, halves, stages = (
        plan_stage(
            Setting(config, MACHINES["H100"], d.ranks, "bf16", False, True, 1.0, adapters=adapters),
            StageShape("one", "sparse", 256, 256, 512, 1, 512), d, "none",
        ).memory
        for d in (Degrees(), Degrees(expert=2), Degrees(pipeline=2))
    )  # fmt: skip
    experts = sum(4 * one.width * one.experts for one in adapters.matrices)
    assert alone.masters - halves.masters == 4 * experts / 2
    assert halves.weights < alone.weights and stages.weights < alone.weights and stages.masters < alone.masters
    assert (alone.buffers, halves.buffers > halves.masters) == (0, True)


STAGE = "\n[[stages]]\nsteps = 3\nsequence = 256\nrow_tokens = 256\n"


def test_the_command_plans_adapters_of_a_recipe_and_of_a_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(f'[model]\nstart = "nano"\n[lora]\nrank = 4\n{STAGE}')
    whole = tmp_path / "whole.toml"
    whole.write_text(f'[model]\nstart = "nano"\n{STAGE}')
    for words in ([], ["--device", CPU]):
        plans = []
        for recipe in (path, whole):
            assert main(["plan", str(recipe), "--json", *words]) == 0
            plans.append(json.loads(capsys.readouterr().out)["stages"][0])
        memory, all_trained = (plan["memory_bytes"] for plan in plans)
        assert memory["total"] < all_trained["total"] and memory["momenta"] < all_trained["momenta"] / 4
        assert plans[0]["computation_seconds"] < plans[1]["computation_seconds"]
    files = sum(file.stat().st_size for file in nano_path().glob("*.safetensors"))
    if backends.native_module() is not None:
        assert memory["weights"] == files  # as stored
    assert main(["plan", "nano", "lora.rank=4", "stages.0.steps=3", "--device", CPU, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stages"][0]
    assert found["memory_bytes"]["masters"] == memory["masters"]
    assert found["memory_bytes"]["weights"] == pytest.approx(files, rel=0.02)
    for words, told in (
        (["lora.alpha=3"], "lora.alpha=3 without lora.rank; allowed: with it"),
        (["lora.rank=2", "lora.targets=wo_a"], "'wo_a', which is no matrix of this model"),
        (["lora.rank=2", "stages.0.attention=warmup"], "a stage with attention 'warmup'; allowed: dense and sparse"),
    ):
        assert main(["plan", "nano", "stages.0.steps=3", *words]) == 2
        assert told in capsys.readouterr().err


def test_a_preset_has_the_bytes_of_its_checkpoint() -> None:
    from dsv4.config import ModelConfig
    from dsv4.training.lora import stored_bytes

    config = ModelConfig.preset("flash")
    if backends.native_module() is None:
        pytest.skip("without native kernels the weights are widened")
    assert stored_bytes(None, config, "bf16") == checkpoint_bytes(config)
    fp8 = stored_bytes(None, config, "fp8")
    assert fp8 is not None and fp8 > 3 * checkpoint_bytes(config)
