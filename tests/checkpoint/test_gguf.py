"""GGUF files: read back with the gguf library, value by value; and (slow) computed by llama.cpp, logit by logit."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from dsv4.checkpoint import CheckpointError, convert, load_model
from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.checkpoint.gguf_vocab import vocabulary
from dsv4.cli import main
from dsv4.config import ModelConfig, nano_path
from dsv4.model.batch import RaggedBatch

from ..llama_cpp import llama_check, logits
from ..published_tokenizer import copy_published_tokenizer, corpus, published_folder

EXPERTS = {"gate": "w1", "down": "w2", "up": "w3"}
# A sample of the names, written out independently: file -> official.
NAMES = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
    "output_hc_fn.weight": "hc_head_fn",
    "blk.0.hc_attn_base.weight": "layers.0.hc_attn_base",
    "blk.0.ffn_gate_tid2eid.weight": "layers.0.ffn.gate.tid2eid",
    "blk.1.attn_sinks.weight": "layers.1.attn.attn_sink",
    "blk.1.attn_q_a.weight": "layers.1.attn.wq_a.weight",
    "blk.1.attn_q_b.weight": "layers.1.attn.wq_b.weight",
    "blk.1.attn_kv.weight": "layers.1.attn.wkv.weight",
    "blk.1.attn_kv_a_norm.weight": "layers.1.attn.kv_norm.weight",
    "blk.1.attn_output_a.weight": "layers.1.attn.wo_a.weight",
    "blk.1.attn_output_b.weight": "layers.1.attn.wo_b.weight",
    "blk.1.attn_compressor_kv.weight": "layers.1.attn.compressor.wkv.weight",
    "blk.2.attn_compressor_gate.weight": "layers.2.attn.compressor.wgate.weight",
    "blk.2.attn_compressor_ape.weight": "layers.2.attn.compressor.ape",
    "blk.3.indexer.proj.weight": "layers.3.attn.indexer.weights_proj.weight",
    "blk.3.exp_probs_b.bias": "layers.3.ffn.gate.bias",
    "blk.3.ffn_gate_inp.weight": "layers.3.ffn.gate.weight",
    "blk.3.ffn_down_shexp.weight": "layers.3.ffn.shared_experts.w2.weight",
}


def write(tiny: Any, folder: Path) -> Path:
    """The fixture's folder without its tokenizer, which is a stub."""
    tiny.write(folder)
    (folder / "tokenizer.json").unlink()
    return folder


def read(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def values(tensor: gguf.ReaderTensor) -> torch.Tensor:
    if tensor.tensor_type == Type.I32:
        return torch.from_numpy(np.array(tensor.data)).long()
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def key(file: Path, name: str) -> Any:
    return gguf.GGUFReader(file).fields[name].contents()


@pytest.mark.parametrize("layout", ["official", "official-base", "bf16", "fp32"])
def test_every_value_equals_the_source(layout: str, tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Odd sizes too: q_lora_rank 40 and w2's 48 columns are not multiples of 32."""
    model = tiny(tiny_config, layout)
    export_gguf(write(model, tmp_path / "model"), tmp_path / "model.gguf")
    tensors = read(tmp_path / "model.gguf")
    for name, official in NAMES.items():
        assert torch.equal(values(tensors[name]), model.values[official]), name
    for layer in range(tiny_config.num_hidden_layers):
        for kind, projection in EXPERTS.items():
            found = values(tensors[f"blk.{layer}.ffn_{kind}_exps.weight"])
            for expert in range(tiny_config.n_routed_experts):
                official = f"layers.{layer}.ffn.experts.{expert}.{projection}.weight"
                assert torch.equal(found[expert], model.values[official]), official
    assert not [name for name in tensors if name.startswith(f"blk.{tiny_config.num_hidden_layers}.")]


def test_each_tensor_has_the_ggml_type_of_its_format(official: Any, tmp_path: Path) -> None:
    export_gguf(write(official, tmp_path / "model"), tmp_path / "model.gguf")
    types = {name: tensor.tensor_type for name, tensor in read(tmp_path / "model.gguf").items()}
    assert types["blk.1.ffn_up_exps.weight"] == Type.MXFP4
    assert types["blk.1.ffn_down_exps.weight"] == Type.BF16  # 48 columns: not whole blocks of 32
    assert types["blk.1.attn_q_a.weight"] == types["token_embd.weight"] == Type.BF16
    assert types["blk.1.attn_norm.weight"] == types["blk.1.ffn_gate_inp.weight"] == Type.F32
    assert types["blk.0.ffn_gate_tid2eid.weight"] == Type.I32


def test_mxfp4_holds_the_codes_and_scales_of_fp4(official: Any, tmp_path: Path) -> None:
    export_gguf(write(official, tmp_path / "model"), tmp_path / "model.gguf")
    blocks = read(tmp_path / "model.gguf")["blk.2.ffn_gate_exps.weight"].data.reshape(5, 48, 5, 17)
    name = "layers.2.ffn.experts.3.w1."
    codes = official.stored[f"{name}weight"].view(torch.uint8).numpy()
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(48, 5, 32)
    assert np.array_equal(blocks[3, ..., 0], official.stored[f"{name}scale"].view(torch.uint8).numpy())
    assert np.array_equal(blocks[3, ..., 1:] & 15, nibbles[..., :16])
    assert np.array_equal(blocks[3, ..., 1:] >> 4, nibbles[..., 16:])


def test_index_heads_are_padded_in_front(official: Any, tmp_path: Path) -> None:
    export_gguf(write(official, tmp_path / "model"), tmp_path / "model.gguf")
    assert key(tmp_path / "model.gguf", "deepseek4.attention.indexer.key_length") == 64
    tensors = read(tmp_path / "model.gguf")
    prefix = "layers.1.attn.indexer."
    for name, official_name, axis in (
        ("indexer.attn_q_b", "wq_b.weight", 0),
        ("indexer_compressor_kv", "compressor.wkv.weight", 0),
        ("indexer_compressor_gate", "compressor.wgate.weight", 0),
        ("indexer_compressor_ape", "compressor.ape", 1),
        ("indexer_compressor_norm", "compressor.norm.weight", 0),
    ):
        heads = values(tensors[f"blk.1.{name}.weight"]).unflatten(axis, (-1, 64))
        padding, kept = heads.split([48, 16], axis + 1)
        assert not padding.any()
        assert torch.equal(kept.flatten(axis, axis + 1), official.values[prefix + official_name])


def test_q8_0_matches_the_library(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = tiny(tiny_config, "official")
    export_gguf(write(model, tmp_path / "model"), tmp_path / "model.gguf", linears="q8_0")
    tensors = read(tmp_path / "model.gguf")
    expected = gguf.quantize(model.values["layers.1.attn.wq_a.weight"].numpy(), Type.Q8_0)
    assert np.array_equal(tensors["blk.1.attn_q_a.weight"].data, expected)
    assert tensors["blk.1.attn_q_b.weight"].tensor_type == Type.BF16  # 40 columns
    assert tensors["blk.1.ffn_up_exps.weight"].tensor_type == Type.MXFP4


def test_mtp_is_a_separate_file(official: Any, tmp_path: Path) -> None:
    file = tmp_path / "mtp.gguf"
    export_gguf(write(official, tmp_path / "model"), file, mtp=True)
    tensors = read(file)
    joined = torch.cat([official.values[f"mtp.0.{name}_proj.weight"] for name in "eh"], 1)
    assert torch.equal(values(tensors["blk.4.nextn.eh_proj.weight"]), joined)
    assert torch.equal(values(tensors["blk.4.nextn.shared_head_norm.weight"]), official.values["mtp.0.norm.weight"])
    assert torch.equal(values(tensors["output_hc_fn.weight"]), official.values["mtp.0.hc_head_fn"])
    assert torch.equal(values(tensors["output.weight"]), official.values["head.weight"])
    assert "blk.0.attn_norm.weight" not in tensors
    assert key(file, "deepseek4.block_count") == 5
    assert key(file, "deepseek4.nextn_predict_layers") == 1


def test_a_folder_of_transformers_exports_the_same_values(
    official: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    convert(write(official, tmp_path / "model"), tmp_path / "hf", "transformers")
    export_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    found = values(read(tmp_path / "model.gguf")["blk.1.ffn_up_exps.weight"])
    assert torch.equal(found[2], official.values["layers.1.ffn.experts.2.w3.weight"])


def test_without_a_tokenizer_the_vocabulary_is_token_ids(official: Any, tmp_path: Path) -> None:
    export_gguf(write(official, tmp_path / "model"), tmp_path / "model.gguf")
    assert key(tmp_path / "model.gguf", "tokenizer.ggml.model") == "no_vocab"
    assert key(tmp_path / "model.gguf", "deepseek4.vocab_size") == 67


def test_nano_s_vocabulary(tmp_path: Path) -> None:
    export_gguf(nano_path(), tmp_path / "nano.gguf")
    tokens, types = (key(tmp_path / "nano.gguf", f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    tokenizer = Tokenizer.from_file(str(nano_path() / "tokenizer.json"))
    assert tokens == [tokenizer.id_to_token(token) for token in range(8192)]
    assert (types[0], types[18], types[8191]) == (3, 4, 1)


@pytest.fixture(scope="module")
def published(tiny: Any, tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny model with the published tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    config = replace(tiny_config, vocab_size=129_280, hidden_size=32)
    copy_published_tokenizer(write(tiny(config, "official"), folder / "model"))
    export_gguf(folder / "model", folder / "model.gguf")
    return folder / "model.gguf"


def test_the_published_vocabulary(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Its normalizer is an empty sequence, and a pattern holds literal CR and LF."""
    copy_published_tokenizer(tmp_path)
    config = replace(tiny_config, vocab_size=129_280, eos_token_id=(1, 128_805, 2))
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in vocabulary(tmp_path, config).items()}
    tokenizer = Tokenizer.from_file(str(published_folder() / "tokenizer.json"))
    assert found["tokens"] == [tokenizer.id_to_token(token) for token in range(129_280)]
    assert (len(found["merges"]), found["merges"][0]) == (127_741, "Ġ t")
    assert [found["token_type"][token] for token in (0, 1, 3, 127_999, 128_000, 128_803)] == [3, 3, 1, 1, 3, 4]
    assert found["pre"] == "deepseek-v3"
    assert [found[f"{name}_token_id"] for name in ("bos", "eos", "eot", "eom")] == [0, 1, 128_805, 2]


def test_too_many_end_tokens_for_gguf_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = nano_with(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 2, 3, 4, 5]}))
    export_gguf(folder, tmp_path / "nano.gguf")
    found = [key(tmp_path / "nano.gguf", f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert found == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: GGUF holds 3 end tokens; without [4, 5]"]


def test_a_repeated_expert_is_a_warning(official: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, table = write(official, tmp_path / "model"), official.stored["layers.0.ffn.gate.tid2eid"].clone()
    table[5:9, 1] = table[5:9, 0]
    change(folder, "layers.0.ffn.gate.tid2eid", table)
    export_gguf(folder, tmp_path / "model.gguf")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("tensor 'layers.0.ffn.gate.tid2eid' repeats an expert for 4 tokens; llama.cpp counts it twice")


def fails(expected: str, folder: Path, file: Path, **options: Any) -> None:
    with pytest.raises(CheckpointError) as raised:
        export_gguf(folder, file, **options)
    assert expected in str(raised.value)
    assert not list(file.parent.glob(".*.tmp"))


def test_an_existing_file_is_kept_unless_overwrite(official: Any, tmp_path: Path) -> None:
    folder, file = write(official, tmp_path / "model"), tmp_path / "model.gguf"
    file.write_text("kept")
    fails("a new file (or --overwrite; in Python overwrite=True); found something there already", folder, file)
    assert file.read_text() == "kept"
    export_gguf(folder, file, overwrite=True)
    assert read(file)
    (tmp_path / "folder.gguf").mkdir()
    fails("the name of a file; found a folder", folder, tmp_path / "folder.gguf", overwrite=True)
    fails("a file name that ends in .gguf; found 'model'", folder, tmp_path / "model")


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    assert tensors[name].shape == tensor.shape
    save_file(tensors | {name: tensor}, shard, metadata={"format": "pt"})


def test_values_without_an_exact_form_are_named(
    official: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    base = write(tiny(tiny_config, "official-base"), tmp_path / "base")
    fails("tensor 'layers.0.attn.wq_a.weight': expected values with an exact BF16 form", base, file, linears="bf16")
    folder = write(official, tmp_path / "model")
    scale = "layers.1.attn.wkv.scale"
    change(folder, scale, torch.zeros_like(official.stored[scale].view(torch.uint8)).view(torch.float8_e8m0fnu))
    fails("tensor 'layers.1.attn.wkv.weight': expected values with an exact BF16 form", folder, file)
    folder = write(official, tmp_path / "nan")
    scale = "layers.2.ffn.experts.3.w1.scale"
    change(folder, scale, torch.full_like(official.stored[scale].view(torch.uint8), 255).view(torch.float8_e8m0fnu))
    fails(f"tensor '{scale}': expected finite numbers; found nan at [0, 0] (code 0xFF)", folder, file)
    folder = write(official, tmp_path / "table")
    table = official.stored["layers.0.ffn.gate.tid2eid"].clone()
    table[3, 1] = 5
    change(folder, "layers.0.ffn.gate.tid2eid", table)
    fails("expected expert numbers from 0 to 4; found 5", folder, file)


def test_a_missing_mtp_block_is_refused(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128, 4))
    fails(
        "expected an MTP block to write; found none",
        write(tiny(config, "bf16"), tmp_path / "m"),
        tmp_path / "m.gguf",
        mtp=True,
    )


def nano_with(tmp_path: Path) -> Path:
    """A folder of links to nano's files, some of which a test replaces."""
    folder = tmp_path / "nano"
    folder.mkdir()
    for file in nano_path().iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", {"type": "NFC"}, "no normalizer, as GGUF requires"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "no normalizer, as GGUF requires"),
        ("pre_tokenizer", {"type": "Whitespace"}, "DeepSeek's pre-tokenizer, which llama.cpp calls deepseek-v3"),
        ("model", {"type": "WordPiece"}, "model.type = 'BPE', as GGUF requires; found 'WordPiece'"),
        ("merges", ["1", "2"], "no merge across digits, since llama.cpp's deepseek-v3 keeps three together"),
        ("dropout", 0.1, "model.dropout = None, as GGUF requires; found 0.1"),
        ("lstrip", True, "added token '<｜begin▁of▁sentence｜>': lstrip = False, as GGUF requires; found True"),
        ("invert", True, "pre_tokenizer.invert = False, as GGUF requires; found True"),
        ("id", 8192, "token numbers from 0 to 8191; found 8192 of 'extra'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(
    part: str, value: Any, message: str, tmp_path: Path
) -> None:
    folder = nano_with(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    if part == "merges":
        content["model"]["merges"].append(value)
    elif part == "dropout":
        content["model"][part] = value
    elif part == "lstrip":
        content["added_tokens"][0][part] = value
    elif part == "invert":
        content["pre_tokenizer"]["pretokenizers"][1][part] = value
    elif part == "id":
        content["added_tokens"].append({"id": value, "content": "extra", "special": False})
    else:
        content[part] = value
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fails(message, folder, tmp_path / "nano.gguf")


def test_the_command_writes_overwrites_and_refuses(
    official: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = str(write(official, tmp_path / "model")), str(tmp_path / "model.gguf")
    assert main(["convert", folder, file, "--format", "gguf"]) == 0
    assert re.fullmatch(re.escape(file) + r": gguf, [0-9.]+ [kM]?B of tensors in [0-9.]+ s\n", capsys.readouterr().out)
    assert main(["convert", folder, file, "--format", "gguf"]) == 2
    assert "expected a new file (or --overwrite; in Python overwrite=True)" in capsys.readouterr().err
    assert main(["convert", folder, file, "--format", "gguf", "--overwrite", "--mtp", "--linears", "q8_0"]) == 0
    assert key(tmp_path / "model.gguf", "deepseek4.nextn_predict_layers") == 1
    assert main(["convert", folder, str(tmp_path / "out"), "--format", "bf16", "--mtp"]) == 2
    assert "--linears and --mtp are not allowed with --format bf16; allowed: gguf" in capsys.readouterr().err


def random_ids(vocab_size: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.slow
@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "no_yarn"])
def test_llama_cpp_computes_a_random_model(yarn: bool, tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """F32 throughout. The index chooses 24 of up to 75 entries; with fewer heads many scores would tie at zero."""
    scaling = tiny_config.rope_scaling if yarn else None
    config = replace(tiny_config, index_topk=24, index_n_heads=16, rope_scaling=scaling)
    folder = write(tiny(config, "fp32"), tmp_path / "model")
    export_gguf(folder, tmp_path / "model.gguf")
    model = load_model(folder)
    for length in (1, 5, 131, 300):
        ids = random_ids(config.vocab_size, length)
        expected = model(ids[None])[0]
        error = (logits(tmp_path / "model.gguf", ids) - expected).abs().max() / expected.abs().max()
        print(f"random model, {length} tokens: largest difference {error:.1e} of the largest logit")
        assert error < 1e-4


@pytest.mark.slow
def test_llama_cpp_breaks_ties_of_the_index_its_own_way(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """With few heads, scores of exactly zero are common. Until the index has to choose, nothing differs."""
    topk = 24
    for heads in (2, 16):
        config = replace(tiny_config, index_topk=topk, index_n_heads=heads)
        folder = write(tiny(config, "fp32"), tmp_path / f"model-{heads}")
        export_gguf(folder, tmp_path / f"{heads}.gguf")
        ids = random_ids(config.vocab_size, 600)
        expected = load_model(folder)(ids[None])[0]
        error = (logits(tmp_path / f"{heads}.gguf", ids) - expected).abs().amax(1) / expected.abs().max()
        # Split after the last token that sees at most topk entries of four tokens.
        before, after = error[: 4 * (topk + 1) - 1], error[4 * (topk + 1) - 1 :]
        print(
            f"{heads} index heads, 600 tokens: largest difference {before.max():.1e} before the index has to choose, "
            f"{after.max():.1e} after"
        )
        assert before.max() < 1e-4
        assert (after.max() < 1e-4) == (heads == 16)


@pytest.mark.slow
def test_llama_cpp_computes_the_mtp_block(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    folder = write(tiny(tiny_config, "fp32"), tmp_path / "model")
    export_gguf(folder, tmp_path / "mtp.gguf", mtp=True)
    model, ids = load_model(folder), random_ids(tiny_config.vocab_size, 201)
    batch = RaggedBatch.pack([ids[:-1].tolist()])
    streams = model.forward_ragged(batch)
    expected = model.mtp_logits(model.mtp_forward(streams, ids[1:], batch))
    streams.numpy().tofile(tmp_path / "streams")
    found = logits(tmp_path / "mtp.gguf", ids[1:], command="draft", streams=tmp_path / "streams")
    error = (found - expected).abs().max() / expected.abs().max()
    print(f"MTP block, 200 tokens: largest difference {error:.1e} of the largest logit")
    assert error < 1e-4


@pytest.mark.slow
def test_llama_cpp_computes_nano(tmp_path: Path) -> None:
    """With the values in F32: agreement to rounding. As exported from FP4 and FP8: llama.cpp rounds activations too."""
    convert(nano_path(), tmp_path / "fp32", "fp32")
    export_gguf(tmp_path / "fp32", tmp_path / "fp32.gguf")
    export_gguf(nano_path(), tmp_path / "nano.gguf")
    model = load_model(nano_path())
    for length in (5, 150, 700, 3000):
        ids = random_ids(8192, length)
        expected = model(ids[None])[0]
        exact, shipped = (
            (logits(tmp_path / name, ids) - expected).abs().amax(1) / expected.abs().max()
            for name in ("fp32.gguf", "nano.gguf")
        )
        above = (exact > 1e-4).float().mean()
        print(
            f"nano, {length} tokens, of the largest logit: F32 {exact.max():.1e}, {above:.1%} of positions above 1e-4; "
            f"MXFP4 and BF16 {shipped.max():.1e}, median position {shipped.median():.1e}"
        )
        # The index takes all entries of the first 512 tokens. Later, ties decide now and then.
        assert exact[:512].max() < 1e-4 and exact.median() < 1e-4
        assert shipped.median() < 2e-2


def token_ids(file: Path, text: str) -> list[int]:
    """Token ids from llama.cpp for a text, special tokens included."""
    return [int(line) for line in llama_check("tokens", file, stdin=text).split()]


@pytest.mark.slow
def test_llama_cpp_tokenizes_as_nano_does(tmp_path: Path) -> None:
    export_gguf(nano_path(), tmp_path / "nano.gguf")
    tokenizer = Tokenizer.from_file(str(nano_path() / "tokenizer.json"))
    for name, text in corpus().items():
        assert token_ids(tmp_path / "nano.gguf", text) == tokenizer.encode(text, add_special_tokens=False).ids, name


@pytest.mark.slow
@pytest.mark.parametrize("name", corpus())
def test_llama_cpp_tokenizes_as_the_published_file_does(name: str, published: Path) -> None:
    tokenizer = Tokenizer.from_file(str(published_folder() / "tokenizer.json"))
    text = corpus()[name]
    assert token_ids(published, text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 0x32000, 0x4000))
def test_llama_cpp_splits_every_character_of_unicode_14_alike(first: int, published: Path) -> None:
    """Each character between letters, digits, punctuation and spaces."""
    tokenizer = Tokenizer.from_file(str(published_folder() / "tokenizer.json"))
    codes = (code for code in range(first, first + 0x4000) if unicodedata.category(chr(code)) not in ("Cn", "Cs"))
    text = "".join(f"a{chr(code)}a 1{chr(code)}1 !{chr(code)}! {chr(code)}{chr(code)}\n" for code in codes)
    assert token_ids(published, text) == tokenizer.encode(text, add_special_tokens=False).ids
