"""Folder of a whole run: where each stage leaves its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4.post_training.v4_recipe import DOMAINS
from dsv4.training.plots import read_metrics


@dataclass(frozen=True)
class RunFolders:
    """Paths below `run_dir`; `given_base` and `given_sft` are model folders in place of the run's own."""

    run_dir: Path
    given_base: Path | None = None
    given_sft: Path | None = None

    @property
    def recipe(self) -> Path:
        return self.run_dir / "v4.toml"

    def without_place(self, command: str) -> str:
        """A stage's command with RUN, BASE and SFT in place of this machine's paths."""
        for name, folder in (("BASE", self.given_base), ("SFT", self.given_sft)):
            command = command.replace(str(folder), name) if folder else command
        return command.replace(f"{self.run_dir}/", "RUN/")

    @property
    def nano(self) -> Path:
        return self.run_dir / "nano"

    @property
    def base(self) -> Path:
        return self.given_base or self.nano / "mid" / "model"

    @property
    def sft(self) -> Path:
        return self.given_sft or self.nano / "model"

    @property
    def start(self) -> Path:
        """The model that specialists, the student and the comparisons begin with."""
        return self.run_dir / "start" / "model"

    def data(self, domain: str) -> Path:
        """Conversations of a domain."""
        return self.run_dir / "data" / f"{domain}.jsonl"

    def tuned(self, domain: str) -> Path:
        """A specialist after fine-tuning."""
        return self.run_dir / "specialists" / domain / "sft" / "model"

    def specialist(self, domain: str) -> Path:
        return self.run_dir / "specialists" / domain / "grpo" / "model"

    @property
    def general(self) -> Path:
        """Teacher of the tasks of no specialist."""
        return self.run_dir / "general" / "grpo" / "model"

    @property
    def averaged(self) -> Path:
        return self.run_dir / "averaged" / "model"

    @property
    def student_tuned(self) -> Path:
        """The student before distillation, if it is fine-tuned."""
        return self.run_dir / "student_sft" / "model"

    @property
    def student(self) -> Path:
        return self.run_dir / "student" / "model"

    @property
    def mixed(self) -> Path:
        return self.run_dir / "mixed" / "model"

    def models(self) -> dict[str, Path]:
        """Every model that is evaluated, by its name in results.json."""
        specialists = {f"specialists.{domain}": self.specialist(domain) for domain in DOMAINS}
        found = {"base": self.base, "sft": self.sft} | specialists
        return found | {"student": self.student, "averaged": self.averaged, "mixed": self.mixed}

    def trained(self) -> Iterator[Path]:
        """Runs of the specialists, of the general teacher if there is one, and of the student."""
        for domain in DOMAINS:
            yield self.tuned(domain).parent
        if self.student_tuned.is_dir():
            yield self.student_tuned.parent
        yield from self.sampled().values()

    def sampled(self) -> dict[str, Path]:
        """Runs that sample, by their names on the page."""
        found = {f"specialists.{domain}": self.specialist(domain).parent for domain in DOMAINS}
        found |= {"general": self.general.parent} if self.general.is_dir() else {}
        return found | {"student": self.student.parent}

    def scores(self, model: str) -> Path:
        """Counts of a model by domain."""
        return self.run_dir / "evaluation" / f"{model}.json"

    @property
    def fine_tuned(self) -> Path:
        """Counts of the specialists before their GRPO, each in its own domain."""
        return self.run_dir / "evaluation" / "fine_tuned.json"

    @property
    def general_scores(self) -> Path:
        """Counts on the general tasks of the start, its teacher and the student."""
        return self.run_dir / "evaluation" / "general.json"

    @property
    def efforts(self) -> Path:
        return self.run_dir / "evaluation" / "efforts.json"

    @property
    def results(self) -> Path:
        return self.run_dir / "results.json"

    @property
    def page(self) -> Path:
        return self.run_dir / "results.html"


def tokens_of(run_dir: Path) -> int:
    """Tokens that the training forwards of a run saw, prompts and tools' results included.

    A run that samples logs them step by step; of steps without that figure, which an older version wrote, those that
    they sampled count. Other runs log the sum alone.
    """
    total = before = 0
    for row in read_metrics(run_dir):
        total += row.get("trained_tokens", row["tokens"] - before)
        before = row["tokens"]
    return total
