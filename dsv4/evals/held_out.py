"""Curve of bits per byte on held-out packages while a model trains."""

from __future__ import annotations

import json
import lzma
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsv4.checkpoint.atomic import new_file
from dsv4.evals.bits_per_byte import XZ_PRESET, held_out_texts, text_bits
from dsv4.model.transformer import Transformer
from dsv4.tokenizer import Tokenizer
from dsv4.training.plots import new_figure

SAMPLE = 60_000  # bytes of each package
CONTEXT = 4096


class HeldOut:
    """Measures a sample of each held-out package of `corpus`; appends to `path`, a line per measurement."""

    def __init__(self, corpus: Path, tokenizer: Path, path: Path) -> None:
        self._samples, self._path = held_out_texts(corpus, SAMPLE), path
        self._corpus, self._tokenizer = corpus, Tokenizer.from_pretrained(tokenizer)

    def measure(self, model: Transformer, step: int, tokens: int) -> float:
        """Mean over the packages of their bits per byte after `step` steps; a step's earlier line is replaced."""
        bits = {
            name: text_bits(model, self._tokenizer, text, CONTEXT) / len(text.encode())
            for name, text in self._samples.items()
        }
        rows = [row for row in read_curve(self._path) if row["step"] < step]
        rows.append({"step": step, "tokens": tokens, "bits_per_byte": bits})
        with new_file(self._path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return sum(bits.values()) / len(bits)

    def has(self, step: int) -> bool:
        """True if the curve has a point after `step` steps."""
        return any(row["step"] == step for row in read_curve(self._path))

    def xz(self) -> dict[str, float]:
        """Bits per byte that `xz -9` needs for each whole package, which helps it: it finds what was said before."""
        wholes = {name: text.encode() for name, text in held_out_texts(self._corpus).items()}
        return {name: 8 * len(lzma.compress(data, preset=XZ_PRESET)) / len(data) for name, data in wholes.items()}

    def draw(self, picture: Path) -> Path | None:
        """Draw the curves over the tokens, with xz's values as dotted lines; None without matplotlib."""
        rows = read_curve(self._path)
        if find_spec("matplotlib") is None or not rows:
            return None
        figure = new_figure(8.0, 4.5)
        axes, xz = figure.subplots(), self.xz()
        for number, name in enumerate(xz):
            values = [row["bits_per_byte"][name] for row in rows]
            axes.plot([row["tokens"] for row in rows], values, color=f"C{number}", label=name)
            axes.axhline(xz[name], color=f"C{number}", linestyle=":", linewidth=1)
        axes.set_title("bits per byte of held-out packages (dotted: xz -9)", fontsize=11)
        axes.set_xlabel("tokens")
        axes.set_ylim(0, 4)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(picture, dpi=130)
        return picture


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Measurements of a run; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
