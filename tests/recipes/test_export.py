"""Models trained by the recipe and exported: served by the engine, computed by transformers and by llama.cpp alike."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.checkpoint import convert, load_model
from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.config import nano_path
from dsv4.evals.verify import TOLERANCE, max_deviation
from dsv4.model.transformer import Transformer
from dsv4.training.qat import as_stored

from ..llama_cpp import llama_check, logits

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pretrain.py"
LENGTH = 131  # one HCA entry; the index takes every CSA entry
CONFIG = replace(
    dsv4.ModelConfig.preset("nano"), hidden_size=64, num_hidden_layers=3, num_hash_layers=1, num_attention_heads=2,
    head_dim=64, q_lora_rank=32, o_groups=2, o_lora_rank=32, index_n_heads=4, index_topk=64, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip


@pytest.fixture(scope="module", params=["with an MTP block", "without an MTP block"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose every step was quantization-aware."""
    root = tmp_path_factory.mktemp("export")
    config = CONFIG
    if request.param == "without an MTP block":
        config = replace(CONFIG, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128))
    (root / "shape").mkdir()
    (root / "shape" / "config.json").write_text(json.dumps(config.to_dict()))
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("Some words, and others; the end.\n" * 60)
    words = [
        *(f"model.base={root / 'shape'}", f"data.text={root / 'texts'}", f"data.tokenizer={nano_path()}"),
        *("stages.0.steps=3", "stages.0.row_tokens=256", "stages.0.sequence=128", "data.group_rows=4"),
        *("run.quantized_share=1", "optimizer.warmup_steps=0", "optimizer.rate=1e-2"),
    ]
    assert runpy.run_path(str(RECIPE))["main"]([*words, "--run-dir", str(root / "run")]) == 0
    return root / "run" / "model"


def ids() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))


def test_the_engine_serves_what_was_trained(trained: Path) -> None:
    """The exported values are those of the last steps: the run's state, rounded as its forward rounded it."""
    model = load_model(trained)
    masters = Transformer(model.config)
    masters.load_state_dict(torch.load(trained.parent / "state.pt")["model"])
    for name, parameter in masters.named_parameters():
        stored = as_stored(name, parameter.detach())
        widened = model.get_parameter(name).detach()
        assert torch.equal(widened + 0, stored) or torch.equal(widened + 0, stored.bfloat16().float()), name
    prompt = ids()[:20].tolist()
    speculate = model.config.num_nextn_predict_layers
    found = [
        dsv4.LLM(trained, speculate=n).generate([prompt], dsv4.SamplingParams(max_tokens=8, temperature=0.0))[0]
        for n in {0, speculate}
    ]
    tokens = list(prompt)
    for token in found[0].token_ids:
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert all(one.token_ids == found[0].token_ids for one in found)


def test_transformers_computes_what_was_trained(trained: Path) -> None:
    pytest.importorskip("transformers")
    deviation, largest = max_deviation(trained, (7, LENGTH))
    assert deviation <= TOLERANCE * max(1.0, largest)


def test_llama_cpp_computes_what_was_trained(trained: Path, tmp_path: Path) -> None:
    """In F32, since llama.cpp rounds activations where weights are FP8 or FP4."""
    convert(trained, tmp_path / "fp32", "fp32")
    export_gguf(tmp_path / "fp32", tmp_path / "model.gguf")
    assert llama_check("tokens", tmp_path / "model.gguf", stdin="the end")
    expected = load_model(trained)(ids()[None])[0]
    error = (logits(tmp_path / "model.gguf", ids()) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
