"""Decode FLOPs against the ratios of the DeepSeek-V4 report and their derivation."""

import pytest

from dsv4.analysis.flops import decode_flops, v3_2_decode_flops
from dsv4.config import ModelConfig

FLASH, PRO = ModelConfig.preset("flash"), ModelConfig.preset("pro")
MILLION = 1 << 20

# Context -> FLOPs of V3.2, Pro, Flash, each raw and FP8-equivalent.
TABLE = {
    4_096: (("1.138e+11", "1.508e+11"), ("1.086e+11", "1.227e+11"), ("2.912e+10", "3.301e+10")),
    131_072: (("2.407e+11", "2.777e+11"), ("1.323e+11", "1.466e+11"), ("4.264e+10", "4.367e+10")),
    MILLION: (("1.158e+12", "1.195e+12"), ("3.033e+11", "3.195e+11"), ("1.404e+11", "1.207e+11")),
}


@pytest.mark.parametrize("context", TABLE)
def test_decode_flops_are_the_published_table(context: int) -> None:
    found = (v3_2_decode_flops(context), decode_flops(PRO, context), decode_flops(FLASH, context))
    assert tuple((f"{flops.raw:.3e}", f"{flops.eq_fp8:.3e}") for flops in found) == TABLE[context]


def test_published_ratios_at_a_million() -> None:
    yardstick = v3_2_decode_flops(MILLION)
    assert f"{decode_flops(FLASH, MILLION).eq_fp8 / yardstick.eq_fp8:.1%}" == "10.1%"
    assert f"{decode_flops(PRO, MILLION).eq_fp8 / yardstick.eq_fp8:.1%}" == "26.7%"
    assert f"{decode_flops(FLASH, MILLION).raw / yardstick.raw:.1%}" == "12.1%"
    assert f"{decode_flops(PRO, MILLION).raw / yardstick.raw:.1%}" == "26.2%"


def test_multiply_adds_of_the_linears_and_experts() -> None:
    for config, layers, linears, experts in (
        (FLASH, 43, 106_954_752, 176_160_768),
        (PRO, 61, 299_892_736, 462_422_016),
    ):
        terms = decode_flops(config, 1).terms
        assert terms["attention linears"] == 2 * layers * linears
        assert terms["experts"] == 2 * layers * experts


def test_flops_grow_per_token_of_context_as_published() -> None:
    def growth(flops: int, at: int) -> float:
        return (flops - at) / MILLION

    flash = growth(decode_flops(FLASH, 2 * MILLION).raw, decode_flops(FLASH, MILLION).raw)
    pro = growth(decode_flops(PRO, 2 * MILLION).raw, decode_flops(PRO, MILLION).raw)
    old = growth(v3_2_decode_flops(2 * MILLION).raw, v3_2_decode_flops(MILLION).raw)
    assert (flash, pro, old) == (86_016 + 20_480, 122_880 + 63_488, 999_424)


def test_terms_at_a_million_are_as_published() -> None:
    terms = decode_flops(FLASH, MILLION).terms
    assert f"{terms['index scores']:.2e} {terms['attention core']:.2e}" == "9.02e+10 2.36e+10"
    terms = decode_flops(PRO, MILLION).terms
    assert f"{terms['index scores']:.3e} {terms['attention core']:.2e}" == "1.288e+11 7.67e+10"
    terms = v3_2_decode_flops(MILLION).terms
    assert f"{terms['index scores']:.3e} {terms['attention core']:.2e}" == "1.048e+12 3.48e+10"


def test_short_contexts_see_all_their_tokens() -> None:
    one = decode_flops(FLASH, 1).terms
    assert one["index scores"] == 0
    assert one["attention core"] == 43 * 4 * 64 * 512
