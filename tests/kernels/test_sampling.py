"""Sampling: the noise, the tokens that the filters keep, the same draw in the reference and on all instruction sets."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sampling import draw_token, likeliest_token, reference

MODULE: Any = backends.native_module()
ISAS = [] if MODULE is None else sorted(MODULE.isas())
INF = math.inf
CPU = torch.device("cpu")
Draw = Callable[..., int]


@pytest.fixture
def draw(rung: str) -> Draw:
    return draw_token


def packed(tokens: list[int], vocab: int) -> np.ndarray:
    """A mask that allows these tokens."""
    bits = np.zeros(-(-vocab // 32) * 32, dtype=np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def kept(
    draw: Draw,
    logits: list[float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: list[int] | None = None,
) -> list[int]:
    """Tokens drawn with 300 keys."""
    row = torch.tensor(logits)
    mask = None if allowed is None else packed(allowed, len(logits))
    return sorted({draw(row, temperature, top_k, top_p, min_p, key, mask) for key in range(300)})


def test_top_k_keeps_the_k_likeliest_with_ties_to_the_lower_id(draw: Draw) -> None:
    assert kept(draw, [0.0, 2.0, 1.0, 1.0, 1.0], top_k=2) == [1, 2]
    assert kept(draw, [0.0, 2.0, 1.0], top_k=99) == [0, 1, 2]
    assert kept(draw, [1.0, 2.0, 2.0, 2.0], top_k=2, min_p=0.5) == [1, 2]
    assert kept(draw, [1.0, -0.0, 0.0, -0.0], top_k=3) == [0, 1, 2]


def test_top_p_keeps_the_fewest_tokens_that_reach_it(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(draw, logits, top_p=0.39) == [1]
    assert kept(draw, logits, top_p=0.41) == [1, 3]
    assert kept(draw, logits, top_p=0.71) == [1, 2, 3]
    assert kept(draw, logits, top_p=1e-9) == [1]
    assert kept(draw, [0.0] * 4, top_p=0.5) == [0, 1]


def test_top_p_counts_shares_of_what_top_k_kept(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(draw, logits, top_k=2, top_p=0.5) == [1]  # 0.4 is more than half of 0.7


def test_min_p_is_relative_to_the_likeliest(draw: Draw) -> None:
    assert kept(draw, [math.log(p) for p in (0.1, 0.5, 0.24, 0.16)], min_p=0.4) == [1, 2]
    assert kept(draw, [1.0, 2.0, 2.0], min_p=1.0) == [1, 2]


def test_temperature_sharpens_before_the_filters(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.6, 0.4)]
    assert kept(draw, logits, top_p=0.65) == [0, 1]
    assert kept(draw, logits, top_p=0.65, temperature=0.5) == [0]  # 0.36 : 0.16
    assert kept(draw, [3.0, 2.0, 3.1], temperature=1e-50) == [2]
    assert kept(draw, [2.0, 3.0, 3.0], temperature=1e-50) == [1], "greedy's, where the noise is lost in rounding"
    assert kept(draw, [300.0, 301.0, -300.0], temperature=5e-324) == [1]


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.999999, 0.0), (0, 1.0, 1e-9)])
def test_impossible_tokens_are_never_drawn(draw: Draw, filters: tuple[int, float, float]) -> None:
    assert kept(draw, [-INF, 0.0, -INF, 0.0, -INF], 1.0, *filters) == [1, 3]
    assert kept(draw, [-INF, 0.0, -INF, 0.0, -INF], 1e300, *filters) == [1, 3]


def test_a_mask_comes_before_the_filters(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(draw, logits, allowed=[0, 2]) == [0, 2]
    assert kept(draw, logits, allowed=[0, 2, 3], top_k=2) == [2, 3]
    assert kept(draw, logits, allowed=[0, 2, 3], top_p=0.6) == [2, 3]  # of 0.6, 0.3 is not enough
    assert kept(draw, logits, allowed=[0, 2, 3], min_p=0.5) == [2, 3]
    assert kept(draw, [-INF, 1.0, -INF], allowed=[2]) == [2]


def test_the_likeliest_token_that_is_allowed(rung: str) -> None:
    row = torch.zeros(1001)
    row[[17, 400, 999]] = 3.0
    assert likeliest_token(row) == 17
    assert likeliest_token(row, packed([16, 400, 999, 1000], 1001)) == 400
    assert likeliest_token(row, packed([5, 1000], 1001)) == 5
    assert likeliest_token(torch.full((40,), -INF), packed([33, 36], 40)) == 33
    for allowed in (packed([], 1001), packed(list(range(1001, 1024)), 1001)):
        with pytest.raises(ValueError, match="the mask allows no token"):
            likeliest_token(row, allowed)
        with pytest.raises(ValueError, match="the mask allows no token"):
            draw_token(row, 1.0, 0, 1.0, 0.0, 1, allowed)
    with pytest.raises(ValueError, match=r"allowed: shape \[31\], expected \[32\]"):
        likeliest_token(row, packed([5], 992))


FILTERS = [
    (0, 1.0, 0.0),
    (40, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.99999, 0.0),
    (300, 0.95, 0.01),
    (0, 1.0, 0.2),
    (7, 0.5, 0.5),
]
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda row: 3 * row,
    "flat": lambda row: 0.01 * row,
    "equal": lambda row: (2 * row).round(),
    "steep": lambda row: 30 * row,
    "huge": lambda row: (1e38 * row).clamp(-3.4e38, 3.4e38),
    "tiny": lambda row: 1e-40 * row,
    "far apart": lambda row: row.sign() * 10.0 ** (8 * row),
    "mostly impossible": lambda row: row.where(row > row.median() - 1e-9, -INF).where(row.abs() < 1.5, -INF),
}
TEMPERATURES = [1.0, 0.6, 3.0, 1e-3, 1e-30, 1e-300, 5e-324, 1e30, 1e300]
VOCABS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 127, 513, 1280, 1283, 5000, 30001]


def row_of(vocab: int, kind: str) -> Tensor:
    row = ROWS[kind](torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)))
    if not row.isfinite().any():
        row[vocab // 2] = 1.0
    return row


def draw_everywhere(*arguments: Any) -> set[int]:
    """Tokens that the reference and every instruction set draw."""
    drawn = {reference.draw_token(*arguments)}
    row, temperature, top_k, top_p, min_p, key, mask = arguments
    for isa in ISAS:
        MODULE.select(isa)
        drawn.add(MODULE.sample(row, mask, temperature, top_k, top_p, min_p, key))
    return drawn


@pytest.fixture
def isa_restored() -> Iterator[None]:
    yield
    if MODULE is not None:
        MODULE.select(MODULE.isas()[-1])


@pytest.mark.parametrize("kind", ROWS)
def test_draws_are_the_same_everywhere(isa_restored: None, kind: str) -> None:
    """Over sizes, filters, temperatures, masks and keys; which go together changes from case to case."""
    case = 0
    for vocab in VOCABS:
        row = row_of(vocab, kind)
        for filters in FILTERS:
            case += 1
            mask = None
            if case % 3 == 0:
                some = torch.rand(vocab, generator=torch.Generator().manual_seed(case)) < (0.9 if case % 2 else 0.05)
                mask = packed([*some.nonzero().flatten().tolist(), case % vocab], vocab)
            for temperature, key in ((1.0, case), (TEMPERATURES[case % 9], 2**64 - 1 - case)):
                drawn = draw_everywhere(row, temperature, *filters, key, mask)
                assert len(drawn) == 1, f"{drawn}: {vocab} tokens, {filters}, {temperature}, {key}, {mask is not None}"


@pytest.mark.parametrize("exponent", range(-44, -35))
def test_min_p_at_the_least_temperatures(isa_restored: None, exponent: int) -> None:
    """Filters take a temperature of at least 1e-37, the draw takes it as it is."""
    row, temperature = row_of(33, "normal") * 10.0**exponent, 10.0**exponent
    assert row.any()
    for key in range(200):
        for min_p in (0.2, 0.99):
            assert len(draw_everywhere(row, temperature, 0, 1.0, min_p, key, None)) == 1, f"{key}, {min_p}"


@pytest.mark.parametrize("kind", ["normal", "flat", "equal"])
def test_draws_from_a_large_vocabulary_are_the_same_everywhere(isa_restored: None, kind: str) -> None:
    for vocab in (129_280, 130_000):
        row = row_of(vocab, kind)
        for i, filters in enumerate(FILTERS):
            mask = packed(list(range(i, vocab, 3)), vocab) if i % 2 else None
            assert len(draw_everywhere(row, 0.7, *filters, 77 + i, mask)) == 1, f"{vocab} tokens, {filters}"


def test_draws_with_thousands_of_keys_are_the_same_everywhere(isa_restored: None) -> None:
    row = row_of(1280, "normal")
    for key in range(0, 2**64, 2**64 // 2000):
        expected = int((row.double() + reference.gumbel_noise(key, 1280, CPU)).argmax())
        for isa in ISAS:
            MODULE.select(isa)
            assert MODULE.sample(row, None, 1.0, 0, 1.0, 0.0, key) == expected, f"{isa}, key {key}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_on_a_gpu_are_those_of_the_cpu() -> None:
    for vocab in (1, 33, 1280, 129_280):
        for kind in ROWS:
            row = row_of(vocab, kind)
            mask = packed(list(range(vocab)), vocab)
            for i, filters in enumerate(FILTERS):
                temperature = TEMPERATURES[i]
                expected = reference.draw_token(row, temperature, *filters, i, mask)
                assert reference.draw_token(row.cuda(), temperature, *filters, i, mask) == expected


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.3), (6, 0.9, 0.1)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(draw: Draw, filters: tuple[int, float, float], temperature: float) -> None:
    """Chi-square of 1,000 draws with keys one apart, against float64."""
    row = torch.randn(11, generator=torch.Generator().manual_seed(4))
    probs = (row.double() / temperature).softmax(0)
    probs = probs.where(reference.kept_tokens(row, temperature, *filters), 0.0)
    expected = 1000 * probs / probs.sum()
    counts = torch.zeros(11, dtype=torch.float64)
    for key in range(1000):
        counts[draw(row, temperature, *filters, key)] += 1
    seen = expected > 0
    assert counts[~seen].sum() == 0
    freedom = int(seen.sum()) - 1
    chi_square = float(((counts - expected) ** 2 / expected)[seen].sum())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_rows_alike_draw_alike_with_one_key(draw: Draw) -> None:
    """Independent draws would agree in as many cases as the sum of squared probabilities: here 1 in 20."""
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(50, generator=generator)
    near = row + 0.1 * torch.randn(50, generator=generator)
    alike = sum(draw(row, 1.0, 0, 1.0, 0.0, key) == draw(near, 1.0, 0, 1.0, 0.0, key) for key in range(300))
    shared = float(torch.minimum(row.softmax(0), near.softmax(0)).sum())  # the most that any coupling reaches
    assert 300 * (2 * shared - 1) < alike


def test_the_noise_is_fixed_for_ever() -> None:
    noise = reference.gumbel_noise(1234567, 3, CPU)
    # The first numbers of SplitMix64's reference implementation at this seed.
    words = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    uniforms = [((word >> 12) + 0.5) * 2.0**-52 for word in words]
    assert noise.tolist() == pytest.approx([-math.log(-math.log(u)) for u in uniforms], rel=1e-15)
    assert [value.hex() for value in noise.tolist()] == [
        "-0x1.8c871b9cb5b71p-5",
        "-0x1.1ebdef4cdae4bp-1",
        "0x1.d7f37d167d72ap-2",
    ]


def test_the_logarithm_is_right_to_a_unit_in_the_last_place() -> None:
    ends = [2.0**-52, 2.0**-53, 1 - 2.0**-53, 1 - 2.0**-52, 0.5, 1.0, 2.0, 36.7, 2**0.5, 0.5**0.5]
    x = torch.cat([torch.tensor(ends), torch.rand(2000), 40 * torch.rand(2000)]).double().clamp(min=2.0**-53)
    for value, found in zip(x.tolist(), reference.natural_log(x).tolist(), strict=True):
        assert abs(found - math.log(value)) <= math.ulp(math.log(value))


def test_weights_are_within_four_units_in_the_last_place() -> None:
    x = torch.linspace(0, -59.9, 100_001)
    exact = (x.double() - x.max().double()).exp()
    assert float(((reference.weights(x, 1.0).double() - exact) / exact).abs().max()) < 4 * 2.0**-23


def test_wrong_input() -> None:
    if MODULE is None:
        pytest.skip("the native kernels are not built")
    with pytest.raises(ValueError, match="temperature"):
        MODULE.sample(torch.zeros(3), None, -1.0, 0, 1.0, 0.0, 5)
    with pytest.raises(ValueError, match="top_k -1"):
        MODULE.sample(torch.zeros(3), None, 1.0, -1, 1.0, 0.0, 5)
    with pytest.raises(ValueError, match="logits"):
        MODULE.sample(torch.zeros(2, 3), None, 1.0, 0, 1.0, 0.0, 5)
    with pytest.raises(ValueError, match="allowed"):
        MODULE.sample(torch.zeros(33), np.zeros(1, dtype=np.uint32), 1.0, 0, 1.0, 0.0, 5)
