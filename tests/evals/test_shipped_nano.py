"""The embedded model itself: its layout, its size, and that it does what its card says."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dsv4
from dsv4.analysis.inventory import tensor_inventory
from dsv4.config import ModelConfig, nano_path
from dsv4.data.tasks import TASKS
from dsv4.engine import LLM
from dsv4.evals.runner import answer_all, is_correct, questions

MAX_BYTES = 25_000_000
SEEDS_BEYOND_THE_CARD = 100_000  # questions that neither training nor the card's table has


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in nano_path().iterdir()}
    assert sum(files.values()) <= MAX_BYTES, files
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(
        files
    )


def test_the_weights_have_the_official_layout() -> None:
    config = ModelConfig.from_pretrained(nano_path())
    assert config == ModelConfig.preset("nano")
    dtypes = Counter(spec.dtype for spec in tensor_inventory(config))
    stored: Counter[str] = Counter()
    for shard in sorted(Path(nano_path()).glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            stored.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    assert stored == dtypes


@torch.no_grad()
def test_shipped_numerics_agree_with_float(llm: LLM) -> None:
    """Training rounded the weights, not the activations: rounding these as well must not change the model."""
    prompt = llm.prompts.encode(questions(["chain_sum"], ["thinking"], 1)[0].prompt())
    exact = dsv4.load(nano_path())(torch.tensor([prompt]))[0, -1].softmax(-1)
    shipped = dsv4.load(nano_path(), numerics="shipped")(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert (exact - shipped).abs().sum() < 0.2


def test_it_answers_questions_it_never_saw(llm: LLM) -> None:
    """Two fresh questions a task in thinking mode. The card's table has more, and intervals."""
    asked = questions(sorted(TASKS), ["thinking"], 2, first_seed=SEEDS_BEYOND_THE_CARD)
    right = [is_correct(answer) for answer in answer_all(llm, asked, max_tokens=400)]
    assert sum(right) >= 0.6 * len(right)
