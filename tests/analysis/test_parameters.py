"""Parameter counts against the published sizes."""

import pytest

from dsv4.analysis import count_parameters
from dsv4.config import ModelConfig

MAIN = {
    "flash": {
        "embed": 529_530_880,
        "head": 529_530_880,
        "norms": 446_080,
        "mhc": 33_884_439,
        "attention": 4_599_057_088,
        "compressors": 261_443_584,
        "indexers": 225_727_488,
        "router": 45_088_768,
        "routed_experts": 277_025_390_592,
        "shared_experts": 1_082_130_432,
        "mtp_projections": 0,
    },
    "pro": {
        "embed": 926_679_040,
        "head": 926_679_040,
        "norms": 1_041_664,
        "mhc": 84_069_603,
        "attention": 18_293_464_704,
        "compressors": 670_097_408,
        "indexers": 501_381_120,
        "router": 167_903_232,
        "routed_experts": 1_547_396_186_112,
        "shared_experts": 4_029_677_568,
        "mtp_projections": 0,
    },
}
MTP = {
    "flash": (6_442_450_944, 106_954_816, 25_165_824, 33_554_432, 1_048_576, 852_027, 22_016),
    "pro": (25_367_150_592, 299_892_864, 66_060_288, 102_760_448, 2_752_512, 1_491_003, 37_888),
}
MTP_COMPONENTS = ("routed_experts", "attention", "shared_experts", "mtp_projections", "router", "mhc", "norms")
# Total, with MTP, active, active with embedding, MTP active, router bias.
TOTALS = {
    "flash": (284_332_230_231, 290_942_278_866, 13_270_091_351, 13_799_622_231, 318_592_635, 10_240),
    "pro": (1_572_997_179_491, 1_598_837_325_086, 48_852_379_747, 49_779_058_787, 869_356_731, 22_272),
}


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_published_counts(name: str) -> None:
    count = count_parameters(ModelConfig.preset(name))
    assert count.main == MAIN[name]
    assert tuple(count.mtp[key] for key in MTP_COMPONENTS) == MTP[name]
    assert sum(count.mtp.values()) == sum(MTP[name])
    found = (count.total, count.total_with_mtp, count.active, count.active_with_embed, count.mtp_active)
    assert (*found, count.router_bias) == TOTALS[name]
    assert count.tid2eid == 2_327_040


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_base_has_the_same_parameters(name: str) -> None:
    assert count_parameters(ModelConfig.preset(f"{name}-base")) == count_parameters(ModelConfig.preset(name))
