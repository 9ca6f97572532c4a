"""Teachers of on-policy distillation: one in memory at a time, or all where they are small, their last hidden states on
disk, their heads on demand.

Hidden states [n, d] take a V-th of the logits' memory: 14 KB instead of 517 KB per token for the published Pro shape
in fp32 logits. They are those that the head reads, after the final norm.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4.analysis.parameters import count_parameters
from dsv4.checkpoint.atomic import new_file
from dsv4.checkpoint.folder import Checkpoint
from dsv4.model.transformer import Transformer
from dsv4.post_training.effort_names import Mode
from dsv4.post_training.efforts import effort_of
from dsv4.post_training.frozen_models import load_frozen
from dsv4.post_training.problems import Problem
from dsv4.post_training.rollouts import Sampled, answer_hidden, packed
from dsv4.tokenizer import Tokenizer
from dsv4.training.qat import as_stored

# Teachers of at most so many bytes together, in fp32, stay in memory: loading takes longer than a small one computes.
KEPT_BYTES = 1 << 30
HEAD, TOKENIZER = "head.weight", "tokenizer.json"


@dataclass(frozen=True)
class Teacher:
    """A specialist's model folder, and its weight w in the objective, sum over teachers of w KL(student || teacher)."""

    folder: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0.0:
            raise ValueError(f"the weight of teacher {self.folder} is {self.weight}; allowed: more than 0")


class Teachers:
    """Teachers by name: "domain.effort", of problems that are asked with that effort, "domain", or "default".

    `cache` is a folder for the hidden states of the step in progress; it is emptied by each. `device`: the student's,
    where they compute, and where what they say comes. `quantized`: they have stored values, as the student does.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], cache: Path, vocab_size: int, numerics: str = "float",
        device: torch.device | str = "cpu", quantized: bool = True,
    ) -> None:  # fmt: skip
        if not teachers:
            raise ValueError("no teachers; allowed: one or more, by domain")
        self.teachers, self.cache, self.numerics, self.device = dict(teachers), cache, numerics, device
        self.quantized = quantized
        self._models: dict[Path, Transformer] = {}  # one, or all if they are resident
        self._heads: dict[Path, Tensor] = {}  # likewise
        sizes: dict[Path, int] = {}
        for domain, teacher in self.teachers.items():
            with Checkpoint(teacher.folder) as checkpoint:
                sizes[teacher.folder] = 4 * count_parameters(checkpoint.config).total
                if checkpoint.config.vocab_size != vocab_size:
                    raise ValueError(
                        f"teacher {domain} ({teacher.folder}) has a vocabulary of {checkpoint.config.vocab_size}, the "
                        f"student of {vocab_size}; allowed: the same tokenizer"
                    )

        self.resident = sum(sizes.values()) <= KEPT_BYTES

    def check(self, asked: Iterable[tuple[str, Mode | None]], student: Path) -> None:
        """ValueError, before a run, for problems without a teacher, or a teacher without problems or with other tokens.

        A default teacher may have none. `asked`: domains and efforts of problems. Other tokens: ids that spell other
        texts than those in the folder `student`; a folder without a tokenizer is not compared.
        """
        asked = list(asked)
        used = {self.named(domain, effort) for domain, effort in asked}
        if unused := sorted({*self.teachers} - used - {"default"}):
            names = {name for domain, effort in asked for name in _names(domain, effort)}
            raise ValueError(
                f"teachers of no problem that is asked: {', '.join(unused)}; allowed: {', '.join(sorted(names))}"
            )
        if not (student / TOKENIZER).is_file():
            return
        tokenizer = Tokenizer.from_pretrained(student)
        for domain, teacher in self.teachers.items():
            known = (teacher.folder / TOKENIZER).is_file()
            if known and not Tokenizer.from_pretrained(teacher.folder).spells_as(tokenizer):
                raise ValueError(
                    f"teacher {domain} ({teacher.folder}) has another tokenizer than {student}: the same token ids are "
                    "other texts; allowed: the same tokenizer"
                )

    def of(self, problem: Problem) -> str:
        """Name of a problem's teacher. ValueError if there is none."""
        return self.named(problem.domain, effort_of(problem))

    def named(self, domain: str, effort: Mode | None = None) -> str:
        """Name of the teacher of problems of a domain under an effort: theirs, else the domain's, else "default".

        ValueError without any.
        """
        names = _names(domain, effort)
        found = next((name for name in names if name in self.teachers), None)
        if found is None:
            raise ValueError(f"no teacher for problems of {names[0]}; there are {', '.join(sorted(self.teachers))}")
        return found

    @torch.no_grad()
    def store(self, by_domain: Mapping[str, Sequence[Sampled]], micro_tokens: int) -> None:
        """Compute each teacher's hidden states of its rollouts, one teacher after the other, and write them."""
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir(parents=True)
        if not self.resident:
            self._heads.clear()
        for domain, rollouts in by_domain.items():
            model = self._model(self.teachers[domain].folder)
            parts: list[Tensor] = []
            for micro in packed(rollouts, micro_tokens):
                hidden, _ = answer_hidden(model, micro)
                parts += hidden.cpu().split([rollout.num_tokens for rollout in micro])
            with new_file(self._file(domain)) as temporary:
                save_file({str(place): part.contiguous() for place, part in enumerate(parts)}, temporary)
            if not self.resident:
                del model  # before the next one is loaded: each may be a whole copy in fp32
                self._models.clear()

    def hidden(self, domain: str, places: Sequence[int]) -> Tensor:
        """Hidden states [n, d] of the rollouts `places` of a domain, laid end to end."""
        with safe_open(self._file(domain), "pt") as file:
            return torch.cat([file.get_tensor(str(place)) for place in places]).to(self.device)

    def head(self, domain: str) -> Tensor:
        """Head [V, d] of a teacher, in fp32. It replaces the one in memory if not all fit: sort samples by teacher."""
        folder = self.teachers[domain].folder
        if folder not in self._heads:
            if not self.resident:
                self._heads.clear()
            with Checkpoint(folder) as checkpoint:
                head = checkpoint.parameter(HEAD, self.device).float()
            self._heads[folder] = as_stored(HEAD, head) if self.quantized else head.clone()
        return self._heads[folder]

    def _model(self, folder: Path) -> Transformer:
        if folder not in self._models:
            self._models[folder] = load_frozen(folder, self.quantized, self.numerics, self.device)
        return self._models[folder]

    def _file(self, domain: str) -> Path:
        return self.cache / f"{quote(domain, safe='')}.safetensors"


def _names(domain: str, effort: Mode | None) -> tuple[str, ...]:
    """Names of the teachers that problems of a domain may have under an effort, the first one that there is."""
    return (domain, "default") if effort is None else (f"{domain}.{effort}", domain, "default")
