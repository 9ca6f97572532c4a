"""What `dsv4 bench engine` measures: models, lengths, rounds. Light to import, for --help."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.comparison.plan import SHAPE, TINY
from dsv4.config import ModelConfig

MODELS = ("slice", "nano", "flash-width", "million")
COMPARED = ("slice", "nano")  # with llama.cpp and transformers
IN_TURNS = "decode, depths in turns"  # a depth against another: in the rounds they are minutes apart
LINEARS = ("bf16", "q8_0")  # what the FP8 linears become in a GGUF, which has no FP8

# One CSA and one HCA layer at Flash's exact widths: 7.2 GB, of which a token reads some 480 MB.
FLASH_WIDTH = replace(
    ModelConfig.preset("flash"),
    num_hidden_layers=2,
    compress_ratios=(4, 128),
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    vocab_size=1024,
)


@dataclass(frozen=True)
class Plan:
    """Lengths are tokens; `budget_s` is what repetitions of one measure of one contender may take in all."""

    name: str
    slice: ModelConfig
    wide: ModelConfig
    rounds: int
    budget_s: float
    prefill: tuple[int, ...]
    depths: tuple[int, ...]  # where decoding starts
    turns: int  # of dsv4 at all depths, seconds apart
    steps: int  # decoded tokens
    transformers_prefill: int  # beyond, its memory outgrows the machine
    llama_depth: int  # llama-bench reads a depth anew for every figure
    wide_prompt: int
    million: int
    million_chunk: int  # tokens between two movements of the bar
    million_steps: int
    agree: int  # prompt of the logits comparison
    agree_steps: int
    ceilings: dict[str, int]

    def marks(self) -> list[int]:
        """Lengths at which the long prompt is looked at: doublings up to its end."""
        marks = [self.million]
        while marks[-1] // 2 >= self.million_chunk:
            marks.append(marks[-1] // 2)
        return marks[::-1]


FULL = Plan(
    name="full",
    slice=SHAPE,
    wide=FLASH_WIDTH,
    rounds=3,
    budget_s=150,
    prefill=(512, 2048, 8192, 32768),
    depths=(0, 1024, 16384, 131072),
    turns=15,
    steps=64,
    transformers_prefill=8192,
    llama_depth=16384,
    wide_prompt=1024,
    million=2**20,
    million_chunk=1024,
    million_steps=32,
    agree=290,
    agree_steps=10,
    ceilings={"megabytes": 256, "size": 2048},
)
QUICK = Plan(
    name="quick",
    slice=TINY,
    wide=replace(TINY, num_hidden_layers=2, compress_ratios=(4, 128), num_hash_layers=0),
    rounds=2,
    budget_s=60,
    prefill=(64, 130),
    depths=(0, 40, 260),
    turns=2,
    steps=4,
    transformers_prefill=64,
    llama_depth=40,
    wide_prompt=130,
    million=1024,
    million_chunk=128,
    million_steps=2,
    agree=140,
    agree_steps=3,
    ceilings={"megabytes": 8, "size": 256},
)
