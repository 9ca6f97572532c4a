"""Routing, and the side outputs of a training forward: loads, the balance loss, the indexer's loss."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4.kernels import backends
from dsv4.kernels.index_loss.reference import indexer_kl
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.initialization import deal_experts
from dsv4.model.layout import Layout
from dsv4.model.moe import Expert, Gate, MoE
from dsv4.model.transformer import Transformer

from .tiny import deviation, random_ids, random_model, tiny_config

CONFIG = tiny_config()
E, K = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok


def random_moe(hashed: bool, **changes: Any) -> MoE:
    config = tiny_config(**changes)
    moe = MoE(config, "layers.0.ffn", hashed, quantize=False)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
    return moe


def layout_of(*lengths: int) -> Layout:
    return Layout(RaggedBatch.pack([[0] * n for n in lengths]), None, torch.device("cpu"))


def single_expert(moe: MoE, number: int) -> Expert:
    """A routed expert as a separate module, with the same weights."""
    expert = Expert(moe.config, moe.config.moe_intermediate_size, quantize=False)
    for name in ("w1", "w2", "w3"):
        matrix = moe.experts.get_parameter(name).detach()[number]
        expert.get_submodule(name).weight = nn.Parameter(matrix, requires_grad=False)
    return expert


def plain_moe(moe: MoE, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out = []
    for t in range(len(x)):
        y = moe.shared_experts(x[t : t + 1])
        for w, e in zip(weights[t].tolist(), index[t].tolist(), strict=True):
            y = y + w * single_expert(moe, e)(x[t : t + 1])
        out.append(y)
    return torch.cat(out)


@pytest.mark.parametrize("hashed", [False, True])
def test_stacked_experts_equal_experts_one_by_one(hashed: bool) -> None:
    moe, x = random_moe(hashed), torch.randn(11, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    ids = random_ids(CONFIG, 11)
    if hashed:  # distinct experts
        moe.gate.get_buffer("tid2eid").copy_(deal_experts(CONFIG, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        weights, index, _ = moe.gate(x, ids)
        assert deviation(moe(x, ids, layout_of(11)), plain_moe(moe, x, weights, index)) < 1e-6


def published_moe(moe: MoE, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """The published inference code's hash routing: one pass over the experts, each added to its rows at once.

    `y[rows] += ...` reads, adds and writes each row once, however often the row stands in `rows`.
    """
    index = table[ids]
    scores = nn.functional.softplus(x @ moe.gate.weight.mT).sqrt()
    weights = scores.gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True) * moe.config.routed_scaling_factor
    y = torch.zeros_like(x)
    for e in range(moe.config.n_routed_experts):
        rows, slots = torch.where(index == e)
        if len(rows):
            expert, limit = single_expert(moe, e), moe.config.swiglu_limit
            up = expert.w3(x[rows]).clamp(-limit, limit)
            gate = expert.w1(x[rows]).clamp(max=limit)
            y[rows] += expert.w2(weights[rows, slots, None] * nn.functional.silu(gate) * up)
    return y + moe.shared_experts(x)


REPEATING = tiny_config(num_experts_per_tok=4)
# No repeat, one, two pairs, three of a kind, all the same.
REPEATS = torch.tensor([[0, 3, 5, 1], [2, 2, 4, 0], [1, 5, 1, 5], [3, 3, 0, 3], [4, 4, 4, 4]])


def repeating_moe() -> tuple[MoE, Tensor, Tensor]:
    """(a hash-routed MoE, inputs, token ids): the first token ids have the rows REPEATS."""
    moe = random_moe(True, num_experts_per_tok=4)
    moe.gate.get_buffer("tid2eid")[: len(REPEATS)] = REPEATS
    ids = torch.tensor([0, 1, 2, 3, 4, 1, 1, 0])
    return moe, torch.randn(len(ids), CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)), ids


def test_a_repeated_expert_counts_once_as_in_the_published_loop() -> None:
    moe, x, ids = repeating_moe()
    with torch.no_grad():
        weights, index, _ = moe.gate(x, ids)
        assert torch.equal(index, REPEATS[ids])
        # The normalizing sum counts every slot, so repeats do not change the other experts' weights.
        assert torch.allclose(weights[4], torch.tensor([REPEATING.routed_scaling_factor / 4, 0, 0, 0]))
        want = published_moe(moe, x, moe.gate.get_buffer("tid2eid"), ids)
        assert deviation(moe(x, ids, layout_of(len(ids))), want) < 1e-6


def test_a_repeated_expert_counts_once_in_native_routing() -> None:
    kernels = backends.native_module()
    if kernels is None:
        pytest.skip("no native kernels")
    moe, x, ids = repeating_moe()
    with torch.no_grad():
        weights, index, _ = moe.gate(x, ids)
        logits = x @ moe.gate.weight.mT
        found, weighed = torch.zeros(len(ids), 4, dtype=torch.int64), torch.zeros(len(ids), 4)
        table = moe.gate.get_buffer("tid2eid")
        kernels.route(logits, table, ids, REPEATING.routed_scaling_factor, found, weighed)
    assert torch.equal(found, index)
    assert torch.allclose(weighed, weights, atol=1e-6)
    assert torch.equal(weighed == 0, weights == 0)


def test_the_gradient_with_repeated_experts_matches_finite_differences() -> None:
    """Finite differences of the published loop along random directions, in float64."""
    moe, x, ids = repeating_moe()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double()
    out = moe(x, ids, layout_of(len(ids)))
    trained = [(n, p) for n, p in moe.named_parameters() if p.requires_grad]
    slopes = torch.autograd.grad((out * target).sum(), [p for _, p in trained], allow_unused=True)
    wide = copy.deepcopy(moe).double()
    with torch.no_grad():
        for (name, _), slope in zip(trained, slopes, strict=True):
            parameter = wide.get_parameter(name)
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
            values = []
            for step in (1e-5, -1e-5):
                parameter.add_(direction, alpha=step)
                table = wide.gate.get_buffer("tid2eid")
                values.append(float((published_moe(wide, x.double(), table, ids) * target).sum()))
                parameter.sub_(direction, alpha=step)
            measured = (values[0] - values[1]) / 2e-5
            assert (0.0 if slope is None else float((slope * direction).sum())) == pytest.approx(
                measured, rel=1e-3, abs=1e-3
            ), name


def gate_and_input() -> tuple[Gate, Tensor]:
    moe = random_moe(False)
    return moe.gate, torch.randn(40, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))


def test_bias_selects_and_never_weighs() -> None:
    gate, x = gate_and_input()
    assert gate.bias is not None
    none = torch.zeros(40, dtype=torch.int64)
    with torch.no_grad():
        gate.bias.zero_()
        gate.bias[4] = 100.0
        weights, index, scores = gate(x, none)
        assert (index == 4).any(1).all()
        chosen = scores.gather(1, index)
        want = chosen / chosen.sum(1, keepdim=True) * CONFIG.routed_scaling_factor
        assert torch.allclose(weights, want, rtol=1e-6)
        gate.bias[4] = -100.0
        assert not (gate(x, none)[1] == 4).any()
    assert not gate.bias.requires_grad


def test_equal_scores_go_to_the_lower_expert() -> None:
    gate, _ = gate_and_input()
    assert gate.bias is not None
    with torch.no_grad():
        gate.bias.zero_()
        assert gate(torch.zeros(3, CONFIG.hidden_size), torch.zeros(3, dtype=torch.int64))[1].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(("vocab", "experts", "k"), [(97, 6, 2), (50, 7, 3), (8, 5, 5), (3, 6, 1)])
def test_dealt_tables_are_even_and_distinct(vocab: int, experts: int, k: int) -> None:
    config = tiny_config(vocab_size=vocab, n_routed_experts=experts, num_experts_per_tok=k)
    table = deal_experts(config, torch.Generator().manual_seed(0))
    assert table.shape == (vocab, k) and table.dtype == torch.int64
    assert all(len(set(row)) == k for row in table.tolist())
    if experts % k == 0:
        counts = torch.bincount(table.flatten(), minlength=experts)
        assert counts.max() - counts.min() <= 1


# Auxiliary losses


def training_forward(model: Transformer, sequences: list[list[int]]) -> tuple[AuxLosses, Tensor]:
    aux = AuxLosses()
    batch = RaggedBatch.pack(sequences)
    streams = model.forward_ragged(batch, aux=aux)
    ids = batch.token_ids.roll(-1)
    return aux, model.mtp_logits(model.mtp_forward(streams, ids, batch, aux=aux)) + model.logits(streams)


def test_loads_count_every_choice_of_the_score_routed_layers() -> None:
    model, ids = random_model(CONFIG), random_ids(CONFIG, 90).tolist()
    aux, _ = training_forward(model, [ids[:37], ids[37:]])
    assert sorted(aux.loads) == ["layers.1.ffn", "layers.2.ffn", "layers.3.ffn", "mtp.0.ffn"]
    for name, load in aux.loads.items():
        assert load.dtype == torch.int64 and load.shape == (E,)
        rows = 88 if name == "mtp.0.ffn" else 90  # the last token of a document has no next one
        assert int(load.sum()) == rows * K


def moe_with_scores(scores: Tensor) -> tuple[MoE, Tensor]:
    """(a MoE, inputs) with affinities `scores` [T, E]: identity router, inputs from the inverse affinity."""
    config = tiny_config(hidden_size=E, n_routed_experts=E)
    moe = MoE(config, "layers.0.ffn", hashed=False, quantize=False)
    with torch.no_grad():
        for p in moe.parameters():
            p.zero_()
        moe.gate.weight.copy_(torch.eye(E))
    return moe, torch.log(torch.expm1(scores**2))


def balance_loss(scores: Tensor, *lengths: int) -> float:
    moe, x = moe_with_scores(scores)
    aux = AuxLosses()
    moe(x, torch.zeros(len(x), dtype=torch.int64), layout_of(*lengths), aux)
    return float(aux.balance_loss.detach())


def test_balance_loss_is_one_when_even() -> None:
    """Every expert chosen equally often, with the same mean affinity."""
    rows = torch.full((E // K, E), 0.5)
    for t in range(E // K):
        rows[t, t * K : (t + 1) * K] = 2.0
    assert balance_loss(rows, E // K) == pytest.approx(1.0, rel=1e-5)
    assert balance_loss(rows.repeat(2, 1), E // K, E // K) == pytest.approx(1.0, rel=1e-5)


def test_balance_loss_of_one_sided_choices() -> None:
    """All tokens choose experts 0 and 1: f = E / K for those, P their share; documents count by their tokens."""
    rows = torch.full((4, E), 0.5)
    rows[:, :K] = 2.0
    share = 2.0 / (2.0 * K + 0.5 * (E - K))
    assert balance_loss(rows, 4) == pytest.approx(K * (E / K) * share, rel=1e-5)
    even = torch.full((E // K, E), 0.5)
    for t in range(E // K):
        even[t, t * K : (t + 1) * K] = 2.0
    both = balance_loss(torch.cat((rows, even)), 4, E // K)
    first, second = 4 * K * (E / K) * share, E // K * 1
    assert both == pytest.approx((first + second) / (4 + E // K), rel=1e-5)  # not f and P of all tokens together


def test_balance_losses_of_layers_add_up() -> None:
    rows = torch.full((E // K, E), 0.5)
    for t in range(E // K):
        rows[t, t * K : (t + 1) * K] = 2.0
    moe, x = moe_with_scores(rows)
    aux = AuxLosses()
    for layer in range(1, 4):
        moe.name = f"layers.{layer}.ffn"
        moe(x, torch.zeros(len(x), dtype=torch.int64), layout_of(E // K), aux)
        assert float(aux.balance_loss.detach()) == pytest.approx(layer, rel=1e-5)


def test_a_row_without_a_next_token_does_not_count_in_an_mtp_block() -> None:
    """As without it, but for the document's weight, which is of all its tokens; one of a single token adds nothing."""
    moe, x = random_moe(False), torch.randn(12, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    whole, cut = AuxLosses(), AuxLosses()
    moe.ahead = 1
    moe(x, torch.zeros(12, dtype=torch.int64), layout_of(5, 1, 6), whole)
    moe.ahead = 0
    kept = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10])
    parts = []
    for rows in kept.split((4, 5)):
        one = AuxLosses()
        moe(x[rows], torch.zeros(len(rows), dtype=torch.int64), layout_of(len(rows)), one)
        parts.append(float(one.balance_loss.detach()))
    moe(x[kept], torch.zeros(9, dtype=torch.int64), layout_of(4, 5), cut)
    assert torch.equal(whole.loads[moe.name], cut.loads[moe.name])
    assert float(whole.balance_loss.detach()) == pytest.approx((5 * parts[0] + 6 * parts[1]) / 12, rel=1e-5)


def test_what_stands_in_for_a_next_token_reaches_no_load_and_no_balance_loss() -> None:
    model, batch = random_model(CONFIG), RaggedBatch.pack([random_ids(CONFIG, 9).tolist(), [3], [5, 4]])
    found = []
    for stand_in in (0, 17):
        ids, aux = batch.token_ids.roll(-1), AuxLosses()
        ids[[8, 9, 11]] = stand_in
        model.mtp_forward(model.forward_ragged(batch), ids, batch, aux=aux)
        found.append((aux.loads["mtp.0.ffn"], aux.balance_loss))
    assert all(map(torch.equal, *found)) and int(found[0][0].sum()) == 9 * K


def test_balance_loss_teaches_the_router_only() -> None:
    moe, x = random_moe(False), torch.randn(12, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    aux = AuxLosses()
    moe(x, torch.zeros(12, dtype=torch.int64), layout_of(5, 7), aux)
    aux.balance_loss.backward()
    assert {n for n, p in moe.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == {"gate.weight"}


@pytest.mark.parametrize("top_k", [3, 64])
def test_indexer_loss_reaches_the_indexer_only(top_k: int) -> None:
    model = random_model(tiny_config(index_topk=top_k)).requires_grad_()
    aux, _ = training_forward(model, [random_ids(CONFIG, 70).tolist(), random_ids(CONFIG, 9, seed=1).tolist()])
    assert float(aux.indexer_loss.detach()) > 0
    aux.indexer_loss.backward()
    taught = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert taught == {n for n, _ in model.named_parameters() if ".indexer." in n}


@pytest.mark.parametrize("top_k", [3, 64])
def test_main_loss_does_not_reach_the_indexer_but_everything_else(top_k: int) -> None:
    """200 tokens, so that HCA has an entry."""
    model = random_model(tiny_config(index_topk=top_k)).requires_grad_()
    _, logits = training_forward(model, [random_ids(CONFIG, 200).tolist()])
    logits.square().mean().backward()
    untaught = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert untaught == {n for n, _ in model.named_parameters() if ".indexer." in n}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_indexer_kl_follows_the_formula_and_is_zero_at_a_fit() -> None:
    """KL(p || softmax(s)) over the entries a row sees; rows that see none give 0; the minimum is 0, at s = log p."""
    probs = torch.tensor([[[0.4, 1.2, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]])
    mask = torch.tensor([[[True, True, True, False], [False] * 4, [True] * 4]])
    scores = torch.tensor([[[1.0, 0.5, -1.0, 50.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]])
    p, q = probs[0, 0, :3] / 2, torch.softmax(scores[0, 0, :3], 0)
    want = torch.tensor([[float((p * (p / q).log()).sum()), 0.0, torch.log(torch.tensor(4.0))]])
    assert torch.allclose(indexer_kl(probs, scores, mask), want, atol=1e-6)
    fitted = indexer_kl(probs[:, :1], (probs[:, :1] + 1e-9).log(), mask[:, :1])
    assert fitted.abs().max() < 1e-6


def test_losses_are_zero_if_no_layer_reports() -> None:
    aux = AuxLosses()
    assert float(aux.balance_loss) == 0 and float(aux.indexer_loss) == 0 and aux.loads == {}
