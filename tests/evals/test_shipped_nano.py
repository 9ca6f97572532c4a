"""The embedded model: layout, size, and the abilities that its card claims."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from deepseek_recipe import Conversation, UserMessage
from safetensors import safe_open

import dsv4
from dsv4.analysis.inventory import tensor_inventory
from dsv4.config import ModelConfig, nano_path
from dsv4.data.tasks import TASKS
from dsv4.engine import LLM, SamplingParams
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
    """Training rounded only the weights; rounding activations too must not change the model's answers."""
    prompt = llm.prompts.encode(questions(["chain_sum"], ["thinking"], 1)[0].prompt())
    exact = dsv4.load(nano_path())(torch.tensor([prompt]))[0, -1].softmax(-1)
    shipped = dsv4.load(nano_path(), numerics="shipped")(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert (exact - shipped).abs().sum() < 0.2


def test_it_answers_questions_it_never_saw(llm: LLM) -> None:
    """Two fresh questions per task of its card in thinking mode; the card has more of them, with intervals."""
    card = (nano_path() / "README.md").read_text(encoding="utf-8")
    claimed = sorted(name for name in TASKS if f"\n| {name} |" in card)
    assert len(claimed) >= 15
    asked = questions(claimed, ["thinking"], 2, first_seed=SEEDS_BEYOND_THE_CARD)
    right = [is_correct(answer) for answer in answer_all(llm, asked, max_tokens=400)]
    assert sum(right) >= 0.75 * len(right)


ANSWERS = {
    "What is 12 + 30?": "42",
    "What is 47 + 38?": "85",
    "Solve for x: 3*x + 4 = 19": "5",
    "Spell this word backward (example: sun -> nus): lemon": "nomel",
    "What is the capital of France?": "The capital of France is Paris.",
    "Extract name and city as JSON: Anna is 34 years old and lives in Rome.": '{"name": "Anna", "city": "Rome"}',
}


def test_it_answers_the_prompts_of_examples_and_chat_page(llm: LLM) -> None:
    composer = (Path(dsv4.__file__).parent / "server/web/static/js/composer.js").read_text(encoding="utf-8")
    suggested = re.findall(r'^  "(.+)",$', composer.split("const SUGGESTIONS")[1].split("];")[0], re.MULTILINE)
    examples = "".join(
        path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "examples").glob("*.py")
    )
    asked = [*suggested, *dict.fromkeys(re.findall(r'"role": "user", "content": "(.+?)"', examples))]
    assert len(suggested) == 5 and set(asked) == set(ANSWERS)
    assert llm.prompts is not None
    prompts = [
        llm.prompts.encode(Conversation([UserMessage(text)], thinking_mode=True, reasoning_effort="low"))
        for text in asked
    ]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=200, temperature=0.0))
    assert [out.text.split("</think>")[-1] for out in outputs] == [ANSWERS[text] for text in asked]
