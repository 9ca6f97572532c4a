"""KV bytes against the published figures."""

import pytest

from dsv4.analysis.kv import (
    V3_2_KV_BYTES_PER_TOKEN,
    KvFormat,
    cache_bytes,
    entry_bytes,
    index_key_bytes,
    kv_bytes_per_token,
)
from dsv4.config import ModelConfig

FLASH, PRO = ModelConfig.preset("flash"), ModelConfig.preset("pro")


@pytest.mark.parametrize(
    ("kv_format", "entry", "key", "flash", "pro"),
    [
        ("fp8+fp4", 584, 68, 3514.25, 5031.4375),
        ("fp8+fp8", 584, 132, 3850.25, 5511.4375),
        ("bf16", 1024, 256, 6880.0, 9848.0),
    ],
)
def test_bytes_per_token_in_every_kv_format(
    kv_format: KvFormat, entry: int, key: int, flash: float, pro: float
) -> None:
    assert entry_bytes(FLASH, kv_format) == entry
    assert index_key_bytes(FLASH, kv_format) == key
    assert kv_bytes_per_token(FLASH, kv_format) == flash
    assert kv_bytes_per_token(PRO, kv_format) == pro


def test_bytes_at_a_million_and_ratios_to_v3_2_are_as_published() -> None:
    assert cache_bytes(FLASH, 1 << 20).growing == 3_684_958_208
    assert cache_bytes(PRO, 1 << 20).growing == 5_275_844_608
    assert V3_2_KV_BYTES_PER_TOKEN == 48_068
    assert f"{kv_bytes_per_token(FLASH) / V3_2_KV_BYTES_PER_TOKEN:.1%}" == "7.3%"
    assert f"{kv_bytes_per_token(PRO) / V3_2_KV_BYTES_PER_TOKEN:.1%}" == "10.5%"


def test_windows_and_open_states_do_not_grow() -> None:
    flash, pro = cache_bytes(FLASH, 0), cache_bytes(PRO, 0)
    assert flash.growing == pro.growing == 0
    assert (flash.windows, pro.windows) == (43 * 128 * 584, 61 * 128 * 584)
    assert cache_bytes(FLASH, 0, "bf16").windows == 43 * 128 * 1024
    assert flash.states == 21 * 2 * 8 * (1024 + 256) * 4 + 20 * 2 * 128 * 512 * 4
    assert pro.states == 30 * 2 * 8 * (1024 + 256) * 4 + 31 * 2 * 128 * 512 * 4


@pytest.mark.parametrize(
    ("tokens", "csa_entries", "hca_entries"), [(3, 0, 0), (4, 1, 0), (127, 31, 0), (128, 32, 1), (263, 65, 2)]
)
def test_an_entry_exists_once_its_window_is_full(tokens: int, csa_entries: int, hca_entries: int) -> None:
    found = cache_bytes(FLASH, tokens)
    assert found.entries == 584 * (21 * csa_entries + 20 * hca_entries)
    assert found.index_keys == 68 * 21 * csa_entries
