"""Training of the nano tokenizer on a sample of the corpus and of everything else that the model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from deepseek_recipe import Conversation, DeepseekV4Encoding

from dsv4.data.tasks import TASKS
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.special import SPECIAL_TOKENS
from dsv4.tokenizer.train import NANO_VOCAB_SIZE, train_tokenizer, write_tokenizer

EXAMPLES_PER_TASK = 1500
EFFORT_COPIES = 40  # copies of the effort instructions, long but rare in the examples, so that they get merges


def task_texts() -> Iterator[str]:
    """Yield plain texts: rendered training examples with worked steps, effort instructions."""
    encoding = DeepseekV4Encoding()
    for task in TASKS.values():
        count = EXAMPLES_PER_TASK // 3 if task.name == "tool_call" else EXAMPLES_PER_TASK
        for seed in range(count):
            example = task.sample(seed, "train")
            prompt = encoding.render_conversation(example.prompt())
            yield from _plain_parts(prompt.prompt, prompt.special_ranges)
            if not task.letterwise:
                yield example.answer
                yield example.reasoning
    for effort in ("high", "max"):
        prompt = encoding.render_conversation(Conversation(thinking_mode=True, reasoning_effort=effort))
        for _ in range(EFFORT_COPIES):
            yield from _plain_parts(prompt.prompt, prompt.special_ranges)


def _plain_parts(prompt: str, ranges: list[tuple[int, int]]) -> Iterator[str]:
    end = 0
    for start, stop in [*ranges, (len(prompt), len(prompt))]:
        if start > end:
            yield prompt[end:start]
        end = stop


def train_nano_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int = NANO_VOCAB_SIZE) -> None:
    """Train on `texts` and the tasks; write tokenizer.json, tokenizer_config.json, generation_config.json to `folder`.

    The folder uses the "preview" effort ladder: only effort "max" adds an instruction, so ordinary prompts stay short.
    """

    def everything() -> Iterator[str]:
        yield from texts
        yield from task_texts()

    tokenizer = train_tokenizer(everything(), vocab_size)
    assert all(tokenizer.token_to_id(text) == n for n, text in enumerate(SPECIAL_TOKENS))
    write_tokenizer(tokenizer, folder)
    write_effort_ladder(folder, "preview")
