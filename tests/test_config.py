"""ModelConfig: presets, both spellings of config.json, and every error of a config."""

import json
import math
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from dsv4.config import ModelConfig, YarnScaling, nano_path
from dsv4.presets import PRESETS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder, effort_ladder

_OFFICIAL = """
architectures model_type vocab_size hidden_size num_hidden_layers num_nextn_predict_layers num_hash_layers
num_attention_heads num_key_value_heads head_dim qk_rope_head_dim q_lora_rank o_groups o_lora_rank sliding_window
index_n_heads index_head_dim index_topk n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
scoring_func topk_method norm_topk_prob routed_scaling_factor swiglu_limit hc_mult hc_sinkhorn_iters hc_eps
rms_norm_eps rope_theta compress_rope_theta rope_scaling max_position_embeddings compress_ratios hidden_act
attention_bias attention_dropout initializer_range tie_word_embeddings use_cache bos_token_id eos_token_id torch_dtype
transformers_version expert_dtype quantization_config
"""
OFFICIAL_KEYS = set(_OFFICIAL.split())


def nano(**changes: Any) -> dict[str, Any]:
    """config.json of the nano shape with some keys changed."""
    return {**ModelConfig.preset("nano").to_dict(), **changes}


def transformers_json(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Content of config.json as transformers writes it after reading `raw`."""
    DeepseekV4Config(**raw).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_config_json(name: str, tmp_path: Path) -> None:
    config = ModelConfig.preset(name)
    assert set(config.to_dict()) == OFFICIAL_KEYS
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_pretrained(tmp_path) == config
    assert ModelConfig.from_pretrained(tmp_path / "config.json") == config


def test_schedules_are_the_published_ones() -> None:
    flash, pro = ModelConfig.preset("flash"), ModelConfig.preset("pro")
    assert (len(flash.compress_ratios), len(pro.compress_ratios)) == (44, 62)
    assert flash.layers_of_kind("swa") == [0, 1]
    assert flash.layers_of_kind("csa") == list(range(2, 43, 2))
    assert flash.layers_of_kind("hca") == list(range(3, 42, 2))
    assert pro.layers_of_kind("hca") == [0, 1, *range(3, 60, 2)]
    assert pro.layers_of_kind("csa") == list(range(2, 61, 2))
    assert flash.layer_kind(43) == pro.layer_kind(61) == "swa"
    assert [flash.is_hash_routed(layer) for layer in (0, 2, 3, 43)] == [True, True, False, False]
    with pytest.raises(IndexError, match="layer 44 is out of range; allowed: 0 to 43"):
        flash.layer_ratio(44)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset 'lite' is unknown; allowed: flash, pro, flash-base, pro-base, nano"):
        ModelConfig.preset("lite")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ModelConfig.preset("nano").vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_reads_the_config_that_transformers_writes(name: str, tmp_path: Path) -> None:
    config = ModelConfig.preset(name)
    saved = transformers_json(config.to_dict(), tmp_path)
    assert "compress_ratios" not in saved and "num_hash_layers" not in saved and "rope_scaling" not in saved
    assert ModelConfig.from_dict(saved) == config


def test_reads_transformers_without_yarn_and_without_quantization(tmp_path: Path) -> None:
    config = replace(ModelConfig.preset("nano"), rope_scaling=None, num_hash_layers=0)
    saved = transformers_json(config.to_dict(quantized=False), tmp_path)
    assert ModelConfig.from_dict(saved) == config
    # expert_dtype sits in quantization_config only
    saved["quantization_config"] = {"quant_method": "fp8", "scale_fmt": "float", "expert_dtype": "fp8"}
    assert ModelConfig.from_dict(saved).expert_dtype == "fp8"


def test_plain_folder_names_no_quantization() -> None:
    plain = ModelConfig.preset("nano").to_dict(quantized=False)
    assert OFFICIAL_KEYS - set(plain) == {"expert_dtype", "quantization_config"}
    assert ModelConfig.from_dict(plain) == ModelConfig.preset("nano")


def test_first_flash_revision_has_no_expert_dtype() -> None:
    raw = ModelConfig.preset("flash").to_dict()
    del raw["expert_dtype"]
    assert ModelConfig.from_dict(raw) == ModelConfig.preset("flash")


def test_tolerated_keys_change_nothing() -> None:
    extra = {"dtype": "float32", "use_cache": False, "pad_token_id": 1, "router_jitter_noise": 0.0, "mlp_bias": False}
    assert ModelConfig.from_dict(nano(**extra, partial_rotary_factor=0.5)) == ModelConfig.preset("nano")


IGNORED: dict[str, Any] = {
    **dict.fromkeys(("torchscript", "is_decoder", "first_k_dense_replace", "kv_lora_rank", "mlp_bias")),
    **dict.fromkeys(("moe_layer_freq", "ep_size", "hidden_sizes"), 1),
    "n_group": 8,
    "topk_group": 4,
    "num_local_experts": 30,
    "qk_nope_head_dim": 32,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "ignored_layers": ["head"],
    "aux_loss_alpha": 0.001,
    "rope_interleave": True,
    "v_head_dim": 64,
    "bits": 4,
}


def test_keys_without_effect_are_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    raw = nano(**IGNORED)
    raw["quantization_config"] = {**raw["quantization_config"], "ignored_layers": [], "bits": 8, "kv_scheme": None}
    raw["rope_scaling"] = {**raw["rope_scaling"], "mscale": None, "attention_factor": None, "finetuned": True}
    for _ in range(2):
        assert ModelConfig.from_dict(raw, "some/config.json") == ModelConfig.preset("nano")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("some/config.json: ignored keys: torchscript, is_decoder, ep_size, hidden_sizes, n_group, ")
    assert "mlp_bias" not in line and "tokenizer_class, ignored_layers, aux_loss_alpha" in line
    assert line.endswith(
        ", quantization_config.ignored_layers, quantization_config.bits, quantization_config.kv_scheme, "
        "rope_scaling.mscale, rope_scaling.finetuned"
    )


def test_the_warning_names_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(nano(torchscript=False)))
    for _ in range(2):
        ModelConfig.from_pretrained(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'config.json'}: ignored keys: torchscript"
    ]


def test_configs_of_transformers_give_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in PRESETS:
        ModelConfig.from_dict(transformers_json(ModelConfig.preset(name).to_dict(), tmp_path))
    assert not [record for record in caplog.records if record.name.startswith("dsv4")]  # transformers may have its own


def test_several_end_tokens_are_all_read() -> None:
    for ids in ([1], [1, 5], [7, 1, 5]):
        config = ModelConfig.from_dict(nano(eos_token_id=ids))
        assert config.eos_token_ids == tuple(ids)
        assert config.to_dict()["eos_token_id"] == ids
        assert ModelConfig.from_dict(config.to_dict()) == config and hash(config)
    assert ModelConfig.preset("nano").eos_token_ids == (1,)
    assert ModelConfig.preset("nano").to_dict()["eos_token_id"] == 1


@pytest.mark.parametrize("drafts", [0, 1])
def test_entries_of_absent_layers_are_left_out(drafts: int) -> None:
    """MTP dropped without shortening the list, or the last layers cut off too."""
    for layers in (6, 4, 1):
        raw = nano(num_hidden_layers=layers, num_nextn_predict_layers=drafts, num_hash_layers=0)
        config = ModelConfig.from_dict(raw)
        assert config.compress_ratios == (*(0, 0, 4, 128, 4, 128)[:layers], *(0,) * drafts)
        assert ModelConfig.from_dict(config.to_dict()) == config


# Keys that the published configs of 31 July and 13 August add to April's; the schedule has three draft entries.
DSPARK: dict[str, Any] = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}


@pytest.mark.parametrize("drafts", [1, 3])
def test_a_draft_model_of_several_blocks_is_left_out(drafts: int, caplog: pytest.LogCaptureFixture) -> None:
    flash = ModelConfig.preset("flash")
    ratios = [*flash.compress_ratios[:43], 0, 0, 0]
    raw = {**flash.to_dict(), **DSPARK, "compress_ratios": ratios, "num_nextn_predict_layers": drafts}
    config = ModelConfig.from_dict(raw, f"drafts-{drafts}")
    assert config == replace(flash, num_nextn_predict_layers=0, compress_ratios=flash.compress_ratios[:43])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"drafts-{drafts}: a draft model of several blocks, which is left out; ignored keys: dspark_block_size, "
        "dspark_noise_token_id, dspark_target_layer_ids, dspark_markov_rank"
    )


WRONG_VALUES = [
    ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3' is not supported; allowed: 'deepseek_v4'"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures = ['LlamaForCausalLM'] is not supported; allowed: ['Deep"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported; allowed: 'sqrtsoftplus'"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy' is not supported; allowed: 'noaux_tc'"),
    ({"norm_topk_prob": False}, "norm_topk_prob = False is not supported; allowed: True"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; allowed: 'silu'"),
    ({"attention_bias": True}, "attention_bias = True is not supported; allowed: False"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported; allowed: 0.0"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported; allowed: False"),
    ({"num_key_value_heads": 4}, "num_key_value_heads = 4 is not supported; allowed: 1"),
    ({"expert_dtype": "int4"}, "expert_dtype = 'int4'"),
    ({"compress_ratios": [0, 0, 4, 64, 4, 128, 0]}, "compress_ratios[3] = 64 is not allowed; allowed: 0, 4 or 128"),
    ({"compress_ratios": [0, 0, 2, 128, 4, 128, 0]}, "ratios 1 and 2 belong to V4.1"),
    ({"compress_ratios": [0, 0, 4, 128, 4, 128]}, "num_nextn_predict_layers = 6 + 1 entries, found 6"),
    ({"compress_ratios": [0, 0, 4, 128, 4, 128, 4]}, "compress_ratios[6] = 4 is not allowed; allowed: 0"),
    ({"compress_ratios": 4}, "compress_ratios = 4 is not supported; allowed: a list"),
    ({"num_hidden_layers": 7}, "num_hidden_layers + num_nextn_predict_layers = 7 + 1 entries, found 7"),
    ({"num_hidden_layers": 6.0}, "num_hidden_layers = 6.0 is not allowed; allowed: an integer of at least 1"),
    ({"vocab_size": "2560"}, "vocab_size = '2560' is not allowed"),
    ({"hidden_size": True}, "hidden_size = True is not allowed"),
    ({"q_lora_rank": 0}, "q_lora_rank = 0 is not allowed"),
    ({"hc_eps": math.nan}, "hc_eps = nan is not allowed; allowed: a finite number above 0"),
    ({"swiglu_limit": 0.0}, "swiglu_limit = 0.0 is not allowed"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1 is not allowed; allowed: an integer of"),
    ({"n_shared_experts": 2}, "n_shared_experts = 2 is not allowed; allowed: 1: V4 has one shared expert"),
    ({"num_hash_layers": 7}, "num_hash_layers = 7 is not allowed; allowed: 0 to num_hidden_layers = 6"),
    ({"o_groups": 3}, "o_groups = 3 is not allowed; allowed: a divisor of num_attention_heads = 4"),
    ({"num_experts_per_tok": 31}, "num_experts_per_tok = 31 is not allowed; allowed: 1 to n_routed_experts = 30"),
    ({"head_dim": 16}, "qk_rope_head_dim = 32 is not allowed; allowed: up to head_dim = 16"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim = 63 is not allowed; allowed: an even number"),
    ({"index_head_dim": 16}, "qk_rope_head_dim = 32 is not allowed; allowed: up to index_head_dim = 16"),
    ({"eos_token_id": 8192}, "eos_token_id = 8192 is not allowed; allowed: 0 to vocab_size - 1 = 8191"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: type 'linear'"),
    ({"rope_scaling": {"type": "yarn", "factor": 16}}, "rope_scaling.original_max_position_embeddings is missing"),
    ({"rope_scaling": {**nano()["rope_scaling"], "mscale": 1.0}}, "rope_scaling.mscale = 1.0 is not supported"),
    ({"rope_scaling": {**nano()["rope_scaling"], "truncate": False}}, "rope_scaling.truncate = False"),
    ({"rope_scaling": {**nano()["rope_scaling"], "rope_type": "longrope"}}, "rope_scaling: type 'longrope'"),
    ({"rope_scaling": {**nano()["rope_scaling"], "factor": -1}}, "rope_scaling.factor = -1 is not allowed"),
    ({"rope_scaling": {**nano()["rope_scaling"], "attention_factor": 1.27}}, "rope_scaling.attention_factor = 1.27"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method = 'awq' is not supported"),
    ({"quantization_config": {"weight_block_size": [64, 64]}}, "quantization_config.weight_block_size = [64, 64]"),
    (
        {"quantization_config": {"expert_dtype": "fp8"}},
        "expert_dtype = 'fp4' contradicts quantization_config.expert_dtype",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config.bits = 4 is not supported; allowed: 8"),
    ({"quantization_config": {"config_groups": {"a": 1}}}, "quantization_config.config_groups = {'a': 1}"),
    ({"quantization_config": {"activation_scheme": "static"}}, "quantization_config.activation_scheme = 'static'"),
    ({"layer_types": ["sliding_attention"] * 6}, "contradicts layer_types"),
    ({"layer_types": ["full_attention"] * 6}, "layer_types[0] = 'full_attention' is not supported"),
    ({"layer_types": [{}] * 6}, "layer_types[0] = {} is not supported"),
    ({"layer_types": ["sliding_attention"]}, "allowed: a list of num_hidden_layers = 6 entries"),
    ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe", "moe"]}, "'hash_moe' entries, then 'moe' entries"),
    ({"mlp_layer_types": ["moe"] * 6}, "num_hash_layers = 2 contradicts mlp_layer_types, which says 0"),
    ({"compress_rates": {"compressed_sparse_attention": 2}}, "compress_rates = {'compressed_sparse_attention': 2}"),
    ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim = 32 contradicts config: partial_rotary_factor 0.25"),
    ({"rope_parameters": {"main": {}}}, "rope_parameters has keys ['main']; allowed: exactly 'compress' and 'main'"),
    (
        {"rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 4e4}}},
        "compress_rope_theta = 160000.0",
    ),
    ({"num_local_experts": 16}, "n_routed_experts = 30 contradicts num_local_experts, which says 16"),
    ({"qkv_bias": True}, "qkv_bias = True is not supported; allowed: False, or no such key"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
    ({"rope_interleave": False}, "rope_interleave = False is not supported; allowed: True"),
    ({"v_head_dim": 128}, "v_head_dim = 128 is not supported; allowed: 64, which follows from head_dim"),
    ({"qk_nope_head_dim": 64}, "qk_nope_head_dim = 64 is not supported; allowed: 32"),
    ({"first_k_dense_replace": 1}, "first_k_dense_replace = 1: this is a DeepSeek V2 or V3 model"),
    ({"vision_config": {}}, "vision_config = {}: this is a vision model"),
    ({"eos_token_id": []}, "eos_token_id = () is not allowed; allowed: 0 to vocab_size - 1 = 8191, or a list"),
    ({"eos_token_id": [1, 8192]}, "eos_token_id = (1, 8192) is not allowed"),
    ({"eos_token_id": [True]}, "eos_token_id = (True,) is not allowed"),
    ({"engram_layers": [1]}, "engram_layers = [1]: this is V4.1"),
    ({"kv_lora_rank": 512}, "kv_lora_rank = 512: this is a DeepSeek V2 or V3 model"),
    ({"moe_inter_dim": 2048}, "the inference demo's config.json"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES, ids=[message[:40] for _, message in WRONG_VALUES])
def test_wrong_value_names_key_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_dict(nano(**changes))


def test_a_misspelling_of_a_missing_key_is_refused() -> None:
    """Otherwise the missing key's default would replace the intended value."""
    raw = nano(swiglu_limits=7.0)
    ModelConfig.from_dict(raw)
    del raw["swiglu_limit"]
    with pytest.raises(ValueError, match="unknown key 'swiglu_limits' .*; allowed: 'swiglu_limit', which is"):
        ModelConfig.from_dict(raw)


def test_missing_keys_are_named() -> None:
    raw = nano()
    del raw["q_lora_rank"], raw["compress_ratios"]
    with pytest.raises(ValueError, match="missing keys: q_lora_rank, compress_ratios"):
        ModelConfig.from_dict(raw)


def test_a_wrong_value_is_refused_at_construction_too() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok = 31"):
        replace(ModelConfig.preset("nano"), num_experts_per_tok=31)
    with pytest.raises(ValueError, match="rope_scaling = {}"):
        replace(ModelConfig.preset("nano"), rope_scaling={})  # type: ignore[arg-type]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config.json at"):
        ModelConfig.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"a": 1}', "missing keys: vocab"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
            ModelConfig.from_pretrained(tmp_path)
        assert message in str(caught.value)


def test_nano_path_holds_the_nano_preset() -> None:
    assert ModelConfig.from_pretrained(nano_path()) == ModelConfig.preset("nano")


def test_the_embedded_model_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelConfig.from_pretrained("nano") == ModelConfig.preset("nano")
    prompts = PromptEncoder.from_pretrained("nano")
    assert prompts.tokenizer.spells_as(Tokenizer.from_pretrained(nano_path()))
    assert prompts.ladder == effort_ladder(nano_path())
    monkeypatch.chdir(tmp_path)
    Path("nano").mkdir()  # a folder has precedence
    with pytest.raises(FileNotFoundError, match="no config.json at nano"):
        ModelConfig.from_pretrained("nano")


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers, drafts = draw(st.integers(1, 9)), draw(st.integers(0, 1))
    ratios = draw(st.lists(st.sampled_from([0, 4, 128]), min_size=layers, max_size=layers))
    rope = 2 * draw(st.integers(1, 32))
    groups, experts = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    size, positive = st.integers(1, 700), st.floats(1e-9, 1e9)
    plain = ("hidden_size", "q_lora_rank", "o_lora_rank", "sliding_window", "index_n_heads", "index_topk")
    plain += ("moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings")
    real = [item.name for item in fields(ModelConfig) if item.type == "float"]
    return ModelConfig(
        vocab_size=draw(st.integers(2, 5000)),
        num_hidden_layers=layers,
        num_nextn_predict_layers=drafts,
        num_hash_layers=draw(st.integers(0, layers)),
        compress_ratios=(*ratios, *[0] * drafts),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        o_groups=groups,
        qk_rope_head_dim=rope,
        head_dim=rope + draw(st.integers(0, 500)),
        index_head_dim=rope + draw(st.integers(0, 100)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        expert_dtype=draw(st.sampled_from(["fp4", "fp8"])),
        eos_token_id=draw(st.integers(0, 1) | st.lists(st.integers(0, 1), min_size=1).map(tuple)),
        rope_scaling=draw(st.none() | st.builds(YarnScaling, positive, size, positive, positive)),
        **{name: draw(size) for name in plain},
        **{name: draw(positive) for name in real},
    )


@given(configs())
def test_any_config_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
