"""Train a tiny model on a folder of text in a few minutes, print a sample of its writing, and how to serve it.

The tokenizer is made from the text, the model has every kind of layer, and the run is one of recipes/pretrain.py.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dsv4  # before torch: it pins MKL's rounding mode

import torch  # isort: skip
from dsv4.commands.recipe_flags import parse
from dsv4.data.records import find_sources
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 2048
SAMPLE_TOKENS = 80
SIZES = {
    "layers": 4, "hidden_size": 128, "head_dim": 64, "q_lora_rank": 64, "o_lora_rank": 64, "n_routed_experts": 8,
    "moe_intermediate_size": 128, "num_hash_layers": 1,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Train, sample, and serve if asked to; 0 when the sample is printed."""
    options = parse("demo", arguments)
    torch.set_num_threads(1)  # so small a model gains little from more, and much is lost where a core is busy
    started = time.monotonic()
    run_dir: Path = options.run_dir or free_folder(ROOT / "runs" / "demo")
    make_tokenizer(options.texts, run_dir / "vocabulary")
    words = [
        *(f"model.{key}={value}" for key, value in SIZES.items()),
        *(f"data.text={options.texts}", f"data.tokenizer={run_dir / 'vocabulary'}", f"stages.0.steps={options.steps}"),
        *("stages.0.sequence=256", "stages.0.row_tokens=2048", "optimizer.rate=6e-3", "loss.mtp=0.1"),
        "run.quantized_share=0.15",  # the model is served as it is stored
    ]
    train: Callable[[list[str]], int] = runpy.run_path(str(Path(__file__).with_name("pretrain.py")))["main"]
    status = train([*words, "--run-dir", str(run_dir)])
    if status:
        return status
    model = run_dir / "model"
    print(f"\ntrained in {time.monotonic() - started:.0f} s; it writes:\n")
    print(sample(model, options.prompt))
    print(f"\nserve it:     dsv4 serve {model}\nlet it write: dsv4 generate {options.prompt!r} --model {model}")
    if options.serve:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "dsv4", "serve", str(model), "--port", str(options.port)])
    return 0


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def make_tokenizer(texts: Path, folder: Path) -> None:
    """Train a tokenizer on the texts."""
    records = (record for source in find_sources([str(texts)]) for record in source.records())
    corpus = (record for record in records if isinstance(record, str))
    write_tokenizer(train_tokenizer(corpus, VOCAB_SIZE), folder)
    write_effort_ladder(folder, "preview")


def sample(model: Path, prompt: str) -> str:
    """The prompt and what the model writes behind it."""
    llm = dsv4.LLM(model)
    settings = dsv4.SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.5, seed=1, ignore_eos=True)
    return prompt + llm.generate([prompt], settings)[0].text


if __name__ == "__main__":
    sys.exit(main())
