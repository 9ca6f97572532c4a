"""Adapters: exact gradients, a base that stays as it is stored, and the merged model's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.checkpoint import convert, load_model, save_model
from dsv4.checkpoint.adapter_files import Adapter
from dsv4.kernels.backends import stored_as_widened
from dsv4.kernels.stored import StoredWeight
from dsv4.model.batch import RaggedBatch
from dsv4.model.lora import is_adapter
from dsv4.model.stacks import native_tensors
from dsv4.model.transformer import Transformer
from dsv4.training.gradient import Work, compute_gradient, pack_batch
from dsv4.training.lora import adaptable, adapter_pairs, add_adapters, chosen, load_adapted, save_adapter
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.losses import LossWeights
from dsv4.training.optim import MuonAdamW
from dsv4.training.state import RunPosition, load_state, save_state

from .tiny_training import CONFIG, VOCAB, Rows, draw_documents, make_model

ALL = ("attention", "experts", "shared_experts", "compressor", "indexer", "head")
SETTINGS = LoraSettings(rank=3, alpha=6.0, targets=ALL)
WORK = Work(0, 0, LossWeights(), quantized=False)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the official FP4 and FP8 layout."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    save_model(make_model()[0], CONFIG, folder)
    return folder


def fill(model: Transformer, seed: int = 7, size: float = 0.2) -> None:
    """Adapters as if trained."""
    draw = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0.0, size, generator=draw)


def logits(model: Transformer, length: int = 150) -> torch.Tensor:
    batch = RaggedBatch.pack([[n * 7 % VOCAB for n in range(length)], [3, 1, 4, 1, 5]])
    with torch.no_grad():
        return model.next_token_logits(batch)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal, or up to rounding where a product with a stored weight is summed in another order (AMX)."""
    return torch.equal(got, want) if stored_as_widened() else torch.allclose(got, want, rtol=0.0, atol=3e-5)


def test_new_adapters_leave_the_base_s_bits_and_formats(base: Path) -> None:
    plain = load_model(base)
    model = load_adapted(base, SETTINGS, torch.device("cpu"), generator())
    assert same(logits(model), logits(plain))
    stored = {name for name, p in plain.named_parameters() if isinstance(p, StoredWeight)}
    assert stored and stored == {name for name, p in model.named_parameters() if isinstance(p, StoredWeight)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}


def test_gradients_are_those_of_the_explicit_product(base: Path) -> None:
    """The same losses of a model whose matrices are W + scale * B A, written by hand, differentiated by autograd."""
    model = load_adapted(base, SETTINGS, torch.device("cpu"), generator())
    fill(model)
    batch = [pack_batch(Rows(draw_documents(3, 140, 30)), torch.device("cpu"))]
    result = compute_gradient(model, batch, WORK)
    explicit = load_model(base, weights="widened").requires_grad_()
    pairs = adapter_pairs(model)
    names = {name if ".experts." in name and ".shared_" not in name else f"{name}.weight": name for name in pairs}
    originals = {name: explicit.get_parameter(name).detach().clone() for name in names}
    leaves = {name: (pair.a.clone().requires_grad_(), pair.b.clone().requires_grad_()) for name, pair in pairs.items()}
    whole = {n: originals[n] + SETTINGS.scale * leaves[names[n]][1] @ leaves[names[n]][0] for n in names}
    with torch.no_grad():
        for name, value in whole.items():
            explicit.get_parameter(name).copy_(value)
    other = compute_gradient(explicit, batch, WORK)
    assert result.losses.next_token == pytest.approx(other.losses.next_token, rel=1e-5)
    assert result.losses.indexer == pytest.approx(other.losses.indexer, rel=1e-4)
    outputs = [whole[name] for name in names]
    torch.autograd.backward(outputs, [explicit.get_parameter(name).grad for name in names])
    found = dict(model.named_parameters())
    for name in pairs:
        owner, _, leaf = name.rpartition(".")
        stacked = f"{owner}.lora_%s.{leaf}" if f"{owner}.lora_A.{leaf}" in found else f"{name}.lora_%s"
        for letter, leaf_tensor in zip("AB", leaves[name], strict=True):
            gradient, wanted = found[stacked % letter].grad, leaf_tensor.grad
            assert gradient is not None and wanted is not None
            torch.testing.assert_close(gradient, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("optimizer", ["adamw_no_decay", "muon"])
def test_steps_change_adapters_alone_and_resume_to_the_same_bits(optimizer: str, base: Path, tmp_path: Path) -> None:
    def build() -> tuple[Transformer, MuonAdamW]:
        model = load_adapted(base, SETTINGS, torch.device("cpu"), generator())
        return model, MuonAdamW(model, CONFIG, compute_dtype=torch.float32, adapters=optimizer)  # pyright: ignore

    def step(model: Transformer, optimizer: MuonAdamW, seed: int) -> float:
        batch = [pack_batch(Rows(draw_documents(seed, 60, 20)), torch.device("cpu"))]
        loss = compute_gradient(model, batch, WORK).losses.next_token
        optimizer.step(5e-3)
        optimizer.zero_grad()
        return loss

    model, muon_adamw = build()
    for seed in (1, 2):
        step(model, muon_adamw, seed)
    save_state(tmp_path / "state.pt", model, muon_adamw, RunPosition(2))
    losses = [step(model, muon_adamw, seed) for seed in (1, 2)]
    assert set(torch.load(tmp_path / "state.pt")["model"]) == {n for n, _ in model.named_parameters() if is_adapter(n)}
    again, muon_adamw = build()
    assert load_state(tmp_path / "state.pt", again, muon_adamw).step == 2
    assert [step(again, muon_adamw, seed) for seed in (1, 2)] == losses
    before = load_model(base).state_dict()
    for (name, one), (_, two) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
        assert is_adapter(name) or torch.equal(one, before[name]), name


@pytest.mark.parametrize("targets", [ALL, ("experts",), ("*.experts.w2", "layers.1.attn.wkv", "mtp.*.w[13]")])
def test_a_merged_model_has_the_adapted_one_s_logits(targets: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(rank=3, alpha=6.0, targets=targets)
    model = load_adapted(base, settings, torch.device("cpu"), generator())
    fill(model)
    save_adapter(adapter_pairs(model), settings, "base", tmp_path / "adapter")
    convert(base, tmp_path / "merged", "fp32", adapter=tmp_path / "adapter")
    merged, adapted = logits(load_model(tmp_path / "merged")), logits(model)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4 * float(adapted.abs().max()))
    assert float((adapted - logits(load_model(base))).abs().max()) > 1e-2 * float(adapted.abs().max())


def test_a_merge_rounds_the_adapted_matrices_alone(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, targets=("layers.1.ffn.*",))
    model = load_adapted(base, settings, torch.device("cpu"), generator())
    fill(model)
    save_adapter(adapter_pairs(model), settings, "base", tmp_path / "adapter")
    errors = convert(base, tmp_path / "merged", "official", adapter=tmp_path / "adapter")
    assert 0 < max(error.relative_rms for error in errors.values()) < 0.2
    changed = Adapter(tmp_path / "adapter", CONFIG).names
    one, two = (load_model(folder, weights="widened") for folder in (base, tmp_path / "merged"))
    for name, tensor in native_tensors(one).items():
        assert torch.equal(tensor, native_tensors(two)[name]) == (name not in changed), name


def test_targets(base: Path) -> None:
    model, _ = make_model()
    names = adaptable(model)
    assert "layers.0.attn.wo_a" not in names and "mtp.0.e_proj" in names
    assert chosen(["attention"], names)[:4] == [f"layers.0.attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_b")]
    assert chosen(["layers.2.ffn.experts.*"], names) == [f"layers.2.ffn.experts.w{n}" for n in (1, 2, 3)]
    assert not [name for name in chosen(ALL, names) if name.startswith("mtp.")]
    with pytest.raises(ValueError, match=r"'wo_a', which is no matrix of this model; allowed: attention, experts"):
        chosen(["wo_a"], names)
    with pytest.raises(ValueError, match=r"layers.0.ffn.experts.w1 without layers.0.ffn.experts.w3"):
        chosen(["*.experts.w1", "*.experts.w2"], names)


def test_an_adapted_model_is_not_frozen_on_the_native_kernels(base: Path) -> None:
    model = load_adapted(base, SETTINGS, torch.device("cpu"), generator())
    fill(model)
    adapted = logits(model)
    assert model.freeze().backend.name == "reference"
    assert torch.equal(logits(model), adapted)


def test_adapters_of_a_widened_model(base: Path) -> None:
    """As on a GPU, where weights cannot stay as they are stored."""
    widened = load_model(base, weights="widened")
    add_adapters(widened, SETTINGS, generator())
    fill(widened)
    stored = load_adapted(base, SETTINGS, torch.device("cpu"), generator())
    fill(stored)
    assert same(logits(widened), logits(stored))


def test_an_adapted_indexer_has_the_loss_that_it_has_among_others() -> None:
    """The loss is a mean over all CSA layers, those of a pipeline's other stages and those without adapters."""
    batch = pack_batch(Rows(draw_documents(3, 60)), torch.device("cpu"))

    def indexer_loss(*layers: int) -> float:
        model, _ = make_model(compress_ratios=(4, 4, 128, 0))
        targets = tuple(f"layers.{layer}.attn.indexer.wq_b" for layer in layers)
        add_adapters(model, LoraSettings(3, 6.0, targets), generator())
        return compute_gradient(model, [batch], WORK).losses.indexer

    one, other = indexer_loss(0), indexer_loss(1)
    assert one > 0 and indexer_loss(0, 1) == pytest.approx(one + other)
