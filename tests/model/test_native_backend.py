"""The native backend of a frozen model: stale tensors, fallback to the reference, copies, invalid input."""

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.linear import linear
from dsv4.kernels.stored import StoredTensor
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.native_backend import NativeBackend, StaleWeightsError
from dsv4.model.transformer import Transformer

from .tiny import random_ids, random_model, store, tiny_config

pytestmark = pytest.mark.skipif(backends.native_module() is None, reason="the native kernels are not built")
CONFIG = tiny_config()
IDS = random_ids(CONFIG, 1, 8)


@pytest.fixture
def model() -> Iterator[Transformer]:
    with torch.no_grad():
        model = random_model(CONFIG)
        model(IDS)
        yield model


def test_a_frozen_model_runs_natively_until_thawed(model: Transformer) -> None:
    assert model.backend.name == "native" and model.frozen and not model.training
    assert model.eval().backend.name == model.requires_grad_(False).backend.name == "native"
    for thaw in (model.requires_grad_, model.train):
        thaw()
        assert model.backend.name == "reference" and not model.frozen
        assert model.refresh().backend.name == "reference", "refresh freezes nothing"
        assert model.freeze().backend.name == "native"
        assert not any(p.requires_grad for p in model.parameters())


def stale(model: Transformer) -> Tensor:
    """Logits after tensors were replaced: an error before `refresh`, then the logits of a copy built from them."""
    with pytest.raises(StaleWeightsError, match="refresh"):
        model(IDS)
    want = copy.deepcopy(model)(IDS)
    assert torch.equal(model.refresh()(IDS), want)
    return want


@pytest.mark.parametrize(
    "name",
    ["layers.3.attn.wq_a.weight", "layers.1.ffn.shared_experts.w2.weight", "layers.2.ffn.experts.w3", "norm.weight"],
)
def test_replaced_weight_data_is_an_error_until_refresh(model: Transformer, name: str) -> None:
    weight, before = model.get_parameter(name), model(IDS)
    weight.data = torch.zeros_like(weight)
    assert not torch.equal(stale(model), before)


def test_new_parameters_modules_and_tables_are_errors_until_refresh(model: Transformer) -> None:
    other = random_model(CONFIG, seed=2)
    for change in (
        lambda: setattr(model.layers[2].attn_norm, "weight", torch.nn.Parameter(torch.ones(CONFIG.hidden_size), False)),
        lambda: setattr(model.layers[2].attn, "wq_a", other.layers[2].attn.wq_a),
        lambda: model.layers.__setitem__(1, other.layers[1]),
        lambda: setattr(model.layers[0].ffn.gate, "tid2eid", (model.layers[0].ffn.gate.tid2eid + 1) % 6),
    ):
        before = model(IDS)
        change()
        assert not torch.equal(stale(model), before)


def test_a_single_weight_that_requires_a_gradient_is_an_error(model: Transformer) -> None:
    model.layers[1].attn.wkv.weight.requires_grad_()
    with pytest.raises(StaleWeightsError, match=r"layers\.1\.attn\.wkv\.weight requires a gradient"):
        model(IDS)


def test_values_written_in_place_are_seen(model: Transformer) -> None:
    before = model(IDS)
    for parameter in model.parameters():
        parameter.mul_(0.9)
    after = model(IDS)
    assert not torch.equal(after, before)
    assert torch.equal(after, model.refresh()(IDS))


def test_replacing_all_tensors_refreshes_the_backend(model: Transformer) -> None:
    doubled = {k: v + v for k, v in model.state_dict().items() if "tid2eid" not in k}
    model.load_state_dict(doubled, strict=False, assign=True)
    assert torch.equal(model(IDS), copy.deepcopy(model)(IDS)) and model.backend.name == "native"
    assert model.bfloat16().backend.name == "reference"
    assert model.float().backend.name == "native"
    assert torch.equal(model(IDS), copy.deepcopy(model)(IDS))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half().float()
        assert torch.equal(model(IDS), copy.deepcopy(model)(IDS))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_a_load_that_fails_refreshes_the_backend(model: Transformer) -> None:
    """nn.Module has assigned the tensors that it found by the time it raises."""
    doubled = {name: 2 * value for name, value in model.state_dict().items() if name.startswith("layers.3.")}
    before = model(IDS)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(doubled, assign=True)
    assert not torch.equal(model(IDS), before)
    assert torch.equal(model(IDS), copy.deepcopy(model)(IDS)) and model.backend.name == "native"


def test_a_conversion_that_fails_refreshes_the_backend(model: Transformer) -> None:
    done = []

    def double_some(tensor: Tensor) -> Tensor:
        done.append(tensor)
        if len(done) == 20:
            raise MemoryError
        return tensor.clone()

    before = model(IDS)
    with pytest.raises(MemoryError):
        model._apply(double_some)
    assert torch.equal(model(IDS), before)


def test_a_refresh_that_fails_leaves_no_backend_of_old_tensors(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends.decline.cache_clear()
    monkeypatch.setattr(backends, "_choice", replace(backends._chosen(), requested=True))
    model.layers[1].ffn.experts.bfloat16()
    with pytest.raises(backends.KernelChoiceError):
        model.refresh()
    assert not model.frozen and model.backend.name == "reference"


def test_a_converted_submodule_is_an_error_until_refresh(model: Transformer) -> None:
    model.layers[0].double()
    with pytest.raises(StaleWeightsError, match=r"layers\.0\..* was replaced"):
        model(IDS)


def test_replaced_parts_of_a_stored_weight_are_errors(model: Transformer) -> None:
    weight = store(model).layers[1].attn.wq_a.weight
    want = model(IDS)
    assert isinstance(weight, StoredTensor) and weight.scales is not None
    for part in ("codes", "scales"):
        kept = getattr(weight, part)
        setattr(weight, part, kept.clone())
        with pytest.raises(StaleWeightsError, match=r"layers\.1\.attn\.wq_a\.weight was replaced"):
            model(IDS)
        setattr(weight, part, kept)
    assert torch.equal(model(IDS), want)
    model.norm.weight.data = model.norm.weight.data[:-1]
    with pytest.raises(StaleWeightsError, match="norm.weight was replaced"):
        model(IDS)


@pytest.mark.parametrize("convert", ["float", "cpu"])
def test_a_conversion_that_changes_nothing_keeps_weights_stored(model: Transformer, convert: str) -> None:
    want = store(model)(IDS)
    kinds = {name: type(parameter) for name, parameter in model.named_parameters()}
    assert getattr(model, convert)().to("cpu", torch.float32) is model
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == kinds
    assert StoredTensor in kinds.values() and torch.equal(model(IDS), want) and model.backend.name == "native"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_conversion_widens_stored_weights(model: Transformer, dtype: torch.dtype) -> None:
    plain = copy.deepcopy(store(model)).widen().to(dtype)
    model.to(dtype)
    assert model.dtype == dtype and {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in plain.parameters()}
    assert model.backend.name == "reference"
    if dtype != torch.float64:  # in which no model runs
        assert torch.equal(model(IDS), plain(IDS))


def test_sharing_memory_widens_stored_weights(model: Transformer) -> None:
    want = copy.deepcopy(store(model)).widen()(IDS)
    torch.nn.Sequential(model).share_memory()
    assert all(type(p) is torch.nn.Parameter and p.is_shared() for p in model.parameters())
    assert torch.equal(model(IDS), want) and model.backend.name == "native"


def test_tensors_replaced_for_one_call_need_a_thawed_model(model: Transformer) -> None:
    tensors = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    with pytest.raises(StaleWeightsError):
        torch.func.functional_call(model, tensors, (IDS[:, :3],))
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.data = tensors[name]
    got = torch.func.functional_call(model.train(), tensors, (IDS[:, :3],))
    assert torch.equal(got, other.train()(IDS[:, :3]))


def test_an_unsupported_model_runs_on_the_reference(
    model: Transformer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of another dtype, which the kernels would copy, and more streams than they support."""
    backends.decline.cache_clear()
    model.layers[1].ffn.experts.bfloat16()
    wide = random_model(tiny_config(hc_mult=17))
    for _ in range(2):
        assert model.refresh().backend.name == wide.refresh().backend.name == "reference"
    assert wide(IDS).isfinite().all()
    assert sorted(record.message.split("because ")[1] for record in caplog.records) == [
        "layers.1.ffn.experts.w1 is torch.bfloat16, the native kernels take torch.float32 in every weight",
        "the model has 17 streams, the native kernels take 16",
    ]
    backends.decline.cache_clear()
    monkeypatch.setattr(backends, "_choice", replace(backends._chosen(), requested=True))
    with pytest.raises(backends.KernelChoiceError, match="DSV4_KERNELS is native, but the model has 17 streams"):
        wide.refresh()


def test_auxiliary_losses_come_from_the_reference(model: Transformer) -> None:
    losses = [AuxLosses() for _ in range(2)]
    batch = RaggedBatch.pack(IDS.tolist())
    got = model.forward_ragged(batch, aux=losses[0])
    assert torch.equal(got, ReferenceBackend(model).run(batch, None, losses[1]))
    assert losses[0].loads.keys() == losses[1].loads.keys() and losses[0].loads


def test_a_thawed_model_never_calls_the_native_forward(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training relies on the reference alone and does not touch the kernels' module."""
    model.requires_grad_()
    code = [value.__code__ for value in vars(NativeBackend).values() if hasattr(value, "__code__")]
    entered: list[str] = []

    def trace(frame, event: str, _: object) -> None:
        if event == "call" and frame.f_code in code:
            entered.append(frame.f_code.co_name)

    streams = None
    with torch.enable_grad():
        sys.setprofile(trace)
        try:
            batch = RaggedBatch.pack(IDS.tolist())
            streams = model.forward_ragged(batch, aux=AuxLosses())
            drafted = model.mtp_forward(streams, IDS[0], batch, aux=AuxLosses())
            (model.logits(streams).sum() + model.mtp_logits(drafted).sum()).backward()
        finally:
            sys.setprofile(None)
    assert not entered and model.head.weight.grad is not None


def test_a_cache_copied_in_inference_mode_is_used(model: Transformer) -> None:
    ids = random_ids(CONFIG, 1, 90)
    want, cache = model(ids), model.new_cache(1, 100)
    model(ids[:, :80], cache)
    with torch.inference_mode():
        again = copy.deepcopy(cache)
        for at in range(80, 90):
            assert torch.equal(model(ids[:, at : at + 1], again)[0], want[0, at : at + 1])


def test_models_and_caches_are_copied_after_use(model: Transformer) -> None:
    want, cache = model(IDS), model.new_cache(1, 64)
    first = model(IDS[:, :5], cache)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.backend.name == "native"
        other.embed.weight.add_(0.0)
        assert torch.equal(other(IDS), want)
    again = copy.deepcopy(cache)
    for row in (cache, again):
        assert torch.equal(torch.cat((first, model(IDS[:, 5:], row)), dim=1), want)


def test_a_model_is_freed_with_its_last_reference() -> None:
    gc.disable()
    try:
        model = random_model(CONFIG)
        with torch.no_grad():
            model(IDS)
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_default_dtype_changes_nothing(model: Transformer) -> None:
    batch, cache = RaggedBatch.pack(IDS.tolist()), model.new_cache(1, 64)
    streams = model.forward_ragged(batch)
    want = model.logits(streams)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model.forward_ragged(batch, cache), streams)
        assert torch.equal(model.logits(streams), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_shared_tensors(model: Transformer) -> None:
    model.head.weight = model.embed.weight
    assert model.refresh()(IDS).isfinite().all()


def test_no_rows(model: Transformer) -> None:
    assert model.logits(torch.empty(0, CONFIG.hc_mult, CONFIG.hidden_size)).shape == (0, CONFIG.vocab_size)


def test_invalid_input_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="layer 0: the cache was made for another model"):
        model(IDS, random_model(tiny_config(head_dim=48)).new_cache(1, 64))
    with pytest.raises(ValueError, match="holds keys of shipped numerics alone, not of float ones"):
        model(IDS, random_model(CONFIG, numerics="shipped").new_cache(1, 64))
    native, half = backends.native_module(), random_model(CONFIG).bfloat16().new_cache(1, 64).layers
    assert native is not None
    with pytest.raises(ValueError, match="window: contiguous bytes in 3 dimensions are allowed"):
        native.Cache(
            [[layer.window] for layer in half],
            *[("float32", 32, 0)] * 2,
            np.zeros((1, 1), int),
            np.zeros(1, int),
            1,
            False,
        )
    streams, batch = model.forward_ragged(RaggedBatch.pack([[1, 2, 3]])), RaggedBatch.pack([[1, 2, 3]], starts=[126])
    with pytest.raises(ValueError, match="cache row 0 cannot take 3 tokens from 126 on"):
        model.mtp_forward(streams, IDS[0, :3], batch, model.new_cache(1, 64))
    table = model.layers[0].ffn.gate.tid2eid
    assert isinstance(table, Tensor)
    table[IDS[0, 3]] = CONFIG.n_routed_experts
    with pytest.raises(ValueError, match="layer 0: tid2eid names expert 6 of 6"):
        model(IDS)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_batch_without_a_cache_starts_at_0(model: Transformer, frozen: bool) -> None:
    model.train(not frozen)
    assert model.backend.name == ("native" if frozen else "reference")
    streams, batch = model.forward_ragged(RaggedBatch.pack([[1], [2]])), RaggedBatch.pack([[1], [2]], starts=[0, 7])
    for call in (
        lambda: model.forward_ragged(batch),
        lambda: model.next_token_logits(batch),
        lambda: model.mtp_forward(streams, IDS[0, :2], batch),
    ):
        with pytest.raises(
            ValueError, match="sequence 1 of the batch starts at 7: a batch without a cache starts at 0"
        ):
            call()


def test_nan_weights_give_nan_logits(model: Transformer) -> None:
    model.layers[1].ffn.shared_experts.w1.weight[0, 0] = float("nan")
    assert model(IDS).isnan().all()


def test_streams_that_require_a_gradient_get_one(model: Transformer) -> None:
    """A frozen model's read-out and MTP block are still differentiable in the given streams."""
    streams = torch.randn(3, CONFIG.hc_mult, CONFIG.hidden_size, requires_grad=True)
    with torch.enable_grad():
        drafted = model.mtp_forward(streams, IDS[0, :3], RaggedBatch.pack([[1, 2, 3]]))
        for out in (model.logits(streams), model.mtp_logits(drafted)):
            (slope,) = torch.autograd.grad(out.sum(), streams, retain_graph=True)
            assert slope.abs().max() > 0


def test_linear_of_no_rows_and_of_columns() -> None:
    weight, x = torch.randn(4, 8), torch.randn(8, 3)
    with torch.no_grad():
        assert linear(x.t()[:0], weight).shape == (0, 4)
        assert torch.allclose(linear(x.t(), weight), x.t() @ weight.t(), atol=1e-5)
