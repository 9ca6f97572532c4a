"""What the native forward notices or refuses: moved tensors, copies of a model, caches and tables that do not fit."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4.kernels import native
from dsv4.kernels.linear import linear
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from .tiny import random_ids, random_model, tiny_config

pytestmark = pytest.mark.skipif(native.module() is None, reason="the native kernels are not built")
CONFIG = tiny_config()
IDS = random_ids(CONFIG, 1, 8)  # few enough that only some tensors are looked at


@pytest.fixture
def model() -> Iterator[Transformer]:
    with torch.no_grad():
        model = random_model(CONFIG)
        model(IDS)
        yield model


def anew(model: Transformer) -> Tensor:
    """Logits of the model's present tensors."""
    model._native = None
    return model(IDS)


def test_moved_tensors_are_noticed(model: Transformer) -> None:
    model.bfloat16().float()
    assert torch.equal(model(IDS), anew(model))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = 2 * parameter.data
    assert torch.equal(model(IDS), anew(model))
    for parameter in model.parameters():
        parameter.data.share_memory_()
        parameter.mul_(0.9)
    assert torch.equal(model(IDS), anew(model))
    model.load_state_dict({k: v + v for k, v in model.state_dict().items() if "tid2eid" not in k}, False, assign=True)
    assert torch.equal(model(IDS), anew(model))


def test_tensors_put_in_the_old_ones_place_are_noticed(model: Transformer) -> None:
    """The old ones, which nobody uses any more, lie where they lay."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        seen = list(model.parameters())
        model.half().float()
        assert seen[0].data_ptr() != next(model.parameters()).data_ptr()
        assert torch.equal(model(IDS[:, :1]), anew(model)[:, :1])
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_tensors_put_in_for_one_call_are_noticed(model: Transformer) -> None:
    for change in (lambda p: 2 * p, lambda p: (2 * p).bfloat16()):
        tensors = {name: change(parameter.detach()) for name, parameter in model.named_parameters()}
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            parameter.data = tensors[name]
        got = torch.func.functional_call(model, tensors, (IDS[:, :3],))
        assert torch.equal(got, other(IDS[:, :3]))


def test_one_new_weight_is_noticed_before_a_single_token(model: Transformer) -> None:
    """Wherever it is."""
    token = IDS[:, :1]
    model(token)
    for layer in model.layers:
        expert = layer.ffn.experts[-1].w1
        for module in (layer.attn.wq_a, layer.attn_norm, expert):
            module.weight = torch.nn.Parameter(3 * module.weight.detach(), requires_grad=False)
            seen, model._native = model(token), None
            assert torch.equal(seen, model(token))


def test_a_new_module_or_table_is_noticed_before_a_single_token(model: Transformer) -> None:
    token, other = IDS[:, :1], random_model(CONFIG, seed=2)
    model.requires_grad_(False), other.requires_grad_(False)
    for change in (
        lambda: setattr(model.layers[2].attn, "wq_a", other.layers[2].attn.wq_a),
        lambda: setattr(model.layers[3].ffn, "experts", other.layers[3].ffn.experts),
        lambda: model.layers.__setitem__(1, other.layers[1]),
        lambda: setattr(model.layers[0].ffn.gate, "tid2eid", (model.layers[0].ffn.gate.tid2eid + 1) % 6),
    ):
        before = model(token)
        change()
        seen, model._native = model(token), None
        assert torch.equal(seen, model(token)) and not torch.equal(seen, before)
    new = other.layers[2].attn.wkv.requires_grad_()
    with torch.enable_grad():
        assert not model(token).requires_grad
        model.layers[2].attn.wkv = new
        assert model(token).requires_grad


def test_what_the_kernels_do_not_take_runs_on_the_reference(
    model: Transformer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of another type, which they would copy, and more streams than they have room for."""
    native.decline.cache_clear()
    assert model._native_forward(1) is not None
    model.layers[1].ffn.experts[2].bfloat16()
    with torch.no_grad():
        wide = random_model(tiny_config(hc_mult=17))
        for _ in range(2):
            assert model._native_forward(IDS.shape[1] * 4) is None
            assert wide(IDS).isfinite().all() and wide._native is None
    assert [record.message.split("because ")[1] for record in caplog.records] == [
        "layers.1.ffn.experts.2.w1.weight is torch.bfloat16, the native kernels take torch.float32 in every weight",
        "the model has 17 streams, the native kernels take 16",
    ]
    native.decline.cache_clear()
    monkeypatch.setattr(native, "_choice", replace(native._chosen(), asked=True))
    with pytest.raises(native.KernelChoiceError, match="DSV4_KERNELS is native, but the model has 17 streams"):
        wide(IDS)


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
        other.embed.weight.add_(0.0)
        assert torch.equal(other(IDS), want)
    again = copy.deepcopy(cache)
    for row in (cache, again):
        assert torch.equal(torch.cat((first, model(IDS[:, 5:], row)), dim=1), want)


def test_a_model_is_freed_with_its_last_name() -> None:
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
    assert model(IDS).isfinite().all()


def test_no_rows(model: Transformer) -> None:
    assert model.logits(torch.empty(0, CONFIG.hc_mult, CONFIG.hidden_size)).shape == (0, CONFIG.vocab_size)


def test_what_does_not_fit_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="layer 0: the cache was made for another model"):
        model(IDS, random_model(tiny_config(head_dim=48)).new_cache(1, 64))
    with pytest.raises(TypeError, match="incompatible"):
        model(IDS, random_model(CONFIG).bfloat16().new_cache(1, 64))
    streams, batch = model.forward_ragged(RaggedBatch.pack([[1, 2, 3]])), RaggedBatch.pack([[1, 2, 3]], starts=[126])
    with pytest.raises(ValueError, match="cache row 0 cannot take 3 tokens from 126 on"):
        model.mtp_forward(streams, IDS[0, :3], batch, model.new_cache(1, 64))
    table = model.layers[0].ffn.gate.tid2eid
    assert isinstance(table, Tensor)
    table[IDS[0, 3]] = CONFIG.n_routed_experts
    with pytest.raises(ValueError, match="layer 0: tid2eid names expert 6 of 6"):
        model(IDS)


def test_weights_that_are_no_number_show(model: Transformer) -> None:
    model.layers[1].ffn.shared_experts.w1.weight[0, 0] = float("nan")
    assert model(IDS).isnan().all()


def test_streams_that_want_a_gradient_get_one(model: Transformer) -> None:
    """A frozen model's read-out and MTP block are still functions of what they are given."""
    model.requires_grad_(False)
    streams = torch.randn(3, CONFIG.hc_mult, CONFIG.hidden_size, requires_grad=True)
    with torch.enable_grad():
        drafted = model.mtp_forward(streams, IDS[0, :3], RaggedBatch.pack([[1, 2, 3]]))
        for out in (model.logits(streams), model.mtp_logits(drafted)):
            (slope,) = torch.autograd.grad(out.sum(), streams, retain_graph=True)
            assert slope.abs().max() > 0


def test_a_weight_that_wants_a_gradient_gets_one(model: Transformer) -> None:
    """Found after inference has begun, in a layer whose places are not looked at before a few tokens."""
    model.requires_grad_(False)
    with torch.enable_grad():
        assert not model(IDS).requires_grad
        expert = model.layers[1].ffn.experts[0].w1
        for weight in (expert.weight.requires_grad_(), torch.nn.Parameter(expert.weight.detach().clone())):
            expert.weight = weight
            assert model(IDS).requires_grad


def test_linear_of_no_rows_and_of_columns() -> None:
    weight, x = torch.randn(4, 8), torch.randn(8, 3)
    with torch.no_grad():
        assert linear(x.t()[:0], weight).shape == (0, 4)
        assert torch.allclose(linear(x.t(), weight), x.t() @ weight.t(), atol=1e-5)
