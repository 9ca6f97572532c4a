"""Teachers of on-policy distillation: one in memory at a time, their last hidden states on disk, their heads on demand.

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

from dsv4.checkpoint import load_model
from dsv4.checkpoint.atomic import new_file
from dsv4.checkpoint.folder import Checkpoint
from dsv4.post_training.rollouts import Sampled, answer_hidden, packed
from dsv4.tokenizer import Tokenizer

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
    """Teachers by domain. `cache` is a folder for the hidden states of the step in progress; it is emptied by each.

    `device`: the student's, where they compute, and where what they say comes.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], cache: Path, vocab_size: int, numerics: str = "float",
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if not teachers:
            raise ValueError("no teachers; allowed: one or more, by domain")
        self.teachers, self.cache, self.numerics, self.device = dict(teachers), cache, numerics, device
        self._resident: tuple[str, Tensor] | None = None  # the one head in memory
        for domain, teacher in self.teachers.items():
            with Checkpoint(teacher.folder) as checkpoint:
                if checkpoint.config.vocab_size != vocab_size:
                    raise ValueError(
                        f"teacher {domain} ({teacher.folder}) has a vocabulary of {checkpoint.config.vocab_size}, the "
                        f"student of {vocab_size}; allowed: the same tokenizer"
                    )

    def check(self, domains: Iterable[str], student: Path) -> None:
        """ValueError, before a run, for a domain of problems without a teacher, or a teacher with another tokenizer.

        That is one whose token ids spell other texts than those in the folder `student`; a folder without a tokenizer
        is not compared.
        """
        for name in domains:
            self.domain_of(name)
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

    def domain_of(self, name: str) -> str:
        """Domain of the teacher for a problem of domain `name`: its own, else "default". ValueError without either."""
        found = next((domain for domain in (name, "default") if domain in self.teachers), None)
        if found is None:
            raise ValueError(f"no teacher for problems of {name}; there are {', '.join(sorted(self.teachers))}")
        return found

    @torch.no_grad()
    def store(self, by_domain: Mapping[str, Sequence[Sampled]], micro_tokens: int) -> None:
        """Compute each teacher's hidden states of its rollouts, one teacher after the other, and write them."""
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir(parents=True)
        self._resident = None
        for domain, rollouts in by_domain.items():
            model = load_model(self.teachers[domain].folder, device=self.device, numerics=self.numerics)
            parts: list[Tensor] = []
            for micro in packed(rollouts, micro_tokens):
                hidden, _ = answer_hidden(model, micro)
                parts += hidden.cpu().split([rollout.num_tokens for rollout in micro])
            with new_file(self._file(domain)) as temporary:
                save_file({str(place): part.contiguous() for place, part in enumerate(parts)}, temporary)

    def hidden(self, domain: str, places: Sequence[int]) -> Tensor:
        """Hidden states [n, d] of the rollouts `places` of a domain, laid end to end."""
        with safe_open(self._file(domain), "pt") as file:
            return torch.cat([file.get_tensor(str(place)) for place in places]).to(self.device)

    def head(self, domain: str) -> Tensor:
        """Head [V, d] of a teacher, in fp32. It replaces the one in memory: sort samples by teacher."""
        if self._resident is None or self._resident[0] != domain:
            self._resident = None
            with Checkpoint(self.teachers[domain].folder) as checkpoint:
                self._resident = (domain, checkpoint.parameter(HEAD, self.device).float().clone())
        return self._resident[1]

    def _file(self, domain: str) -> Path:
        return self.cache / f"{quote(domain, safe='')}.safetensors"
