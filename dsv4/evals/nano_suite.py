"""The nano model's whole evaluation: tasks, open questions, definitions, haystacks, bits per byte; as one report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dsv4
from dsv4.data.nano.build import load_entries, load_words
from dsv4.engine import LLM
from dsv4.engine.loading import check_device
from dsv4.evals import bits_per_byte, definitions, needles, open_questions
from dsv4.evals.bits_per_byte import Compressed
from dsv4.evals.definitions import Choices
from dsv4.evals.ledger import Ledger, digest_files
from dsv4.evals.needles import Cell
from dsv4.evals.open_questions import OpenAnswer
from dsv4.model_folder import resolve_model
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.training.export import TOKENIZER_FILES
from dsv4.training.start import fingerprint

PARTS = ("open", "definitions", "bytes", "needles")  # besides the tasks; they need the run's data or corpus
NEEDLE_TESTS = 20  # per depth
CONTEXT = 32768  # tokens of a piece whose bits are counted


@dataclass(frozen=True)
class SuiteSettings:
    """`data`: folder that `dsv4 train nano` made of `corpus`. `ledger`: file by which a killed call goes on."""

    corpus: Path
    data: Path
    ledger: Path | None = None
    needle_tests: int = NEEDLE_TESTS  # up to 32K tokens
    needle_lengths: tuple[int, ...] = needles.LENGTHS
    definitions: int = 800
    byte_limit: int | None = None  # of each held-out package
    device: str = "cpu"

    def open_ledger(self, model: Path) -> Ledger:
        """Ledger of results of a model folder. ValueError if the file is of another model, corpus or data."""
        if self.ledger is None:
            return Ledger(None)
        settings = [path for name in ("config.json", *TOKENIZER_FILES) if (path := model / name).is_file()]
        origin = {
            "model": f"{fingerprint(model)} {digest_files(settings)}",
            "data": digest_files(self.data / name for name in ("entries.jsonl", "words.txt")),
            "corpus": digest_files((self.corpus / "validation").glob("*/*.jsonl")),
        }
        return Ledger(self.ledger, origin)


@dataclass(frozen=True)
class SuiteReport:
    """Results of the parts that were asked for."""

    open_answers: list[OpenAnswer] = field(default_factory=list[OpenAnswer])
    choices: list[Choices] = field(default_factory=list[Choices])
    compressed: list[Compressed] = field(default_factory=list[Compressed])
    cells: list[Cell] = field(default_factory=list[Cell])

    def to_markdown(self) -> str:
        """Tables of all parts."""
        tables = [
            open_questions.to_lines(self.open_answers) if self.open_answers else (),
            definitions.to_lines(self.choices) if self.choices else (),
            bits_per_byte.to_lines(self.compressed) if self.compressed else (),
            needles.to_lines(self.cells) if self.cells else (),
        ]
        return "\n".join(text for table in tables if (text := "".join(f"{line}\n" for line in table)))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SuiteReport:
        """Report that `to_json` wrote."""
        return cls(
            [OpenAnswer(**value) for value in values["open_answers"]],
            [Choices(**value) for value in values["choices"]],
            [Compressed(**value) for value in values["compressed"]],
            [Cell(**value) for value in values["cells"]],
        )


def run_suite(
    model: str | Path, parts: Sequence[str], settings: SuiteSettings, say: Callable[[str], object] = lambda text: None
) -> SuiteReport:
    """Run the `parts` on a model folder; each result is kept in the ledger as it comes."""
    check_device(settings.device)
    folder = resolve_model(model)
    ledger = settings.open_ledger(folder)
    report = SuiteReport()
    if "open" in parts:
        key = "open questions"
        found = ledger.get(key)
        if found is None:
            answers = open_questions.ask(
                LLM(folder, max_num_seqs=32, device=settings.device), load_words(settings.data)
            )
            found = ledger.put(key, [asdict(answer) for answer in answers])
        report.open_answers.extend(OpenAnswer(**value) for value in found)
        say(f"open questions: {sum(a.plain for a in report.open_answers)} of {len(report.open_answers)} plain")
    if "definitions" in parts or "bytes" in parts:
        loaded, tokenizer = dsv4.load(folder, device=settings.device), Tokenizer.from_pretrained(folder)
        if "definitions" in parts:
            entries, prompts = load_entries(settings.data), PromptEncoder.from_pretrained(folder)
            for name, held_out in (("asked in training, other words", False), ("never asked in training", True)):
                choices = definitions.make_choices(entries, held_out, settings.definitions)
                report.choices.append(definitions.choose(loaded, prompts, name, choices, ledger))
                say(f"definitions, {name}: {report.choices[-1].right} of {report.choices[-1].asked}")
        if "bytes" in parts:
            for name, text in bits_per_byte.held_out_texts(settings.corpus, settings.byte_limit).items():
                report.compressed.append(bits_per_byte.compress(loaded, tokenizer, name, text, CONTEXT, ledger))
                say(f"{name}: {report.compressed[-1].model:.3f} bits per byte, xz {report.compressed[-1].xz:.3f}")
    if "needles" in parts:
        llm = LLM(folder, max_num_seqs=1, device=settings.device)
        report.cells.extend(
            needles.needle_curve(
                llm, settings.corpus, settings.data, settings.needle_lengths, settings.needle_tests, ledger, say
            )
        )
    return report


def read_report(path: Path) -> SuiteReport:
    """Report in a JSON file that `dsv4 eval nano --output` wrote."""
    return SuiteReport.from_json(json.loads(path.read_text(encoding="utf-8"))["suite"])
