"""Keys of the problems that recipes ask, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import PrivateAttr, model_validator

from dsv4.post_training.answer_checks import Check
from dsv4.post_training.data_problems import Files, RowProblem, Rows, read_problems
from dsv4.post_training.domains.domain import Level
from dsv4.post_training.domains.registry import PARTIAL, DomainProblems, mixed
from dsv4.post_training.effort_names import NON_THINK, Mode, ModeName, asked_modes
from dsv4.post_training.efforts import EffortMode, EffortProblems, SomeEfforts
from dsv4.post_training.key_types import Positive, Share
from dsv4.post_training.problems import Problem, ProblemSource, TaskProblems
from dsv4.post_training.tested_problem import TestedProblem
from dsv4.tokenizer.prompts import Ladder
from dsv4.training.recipe import Section

Names = Files  # one name stands for a tuple of it, too


class ProblemsSection(Section):
    """Tasks, domains and the user's own problems that are asked; each as often as the others, or by weights.

    `data`: files whose rows are problems (post_training/data_problems.py). `efforts`: each problem is asked with one of
    them, and with thinking: levels, budgets of 1 to 100, or "1-100" for all of these; or `none`, without. With
    `effort_domains`, problems of these tasks and domains alone.
    """

    tasks: Names = ()
    weights: tuple[float, ...] = ()  # of the tasks
    domains: Names = ()
    domain_weights: tuple[float, ...] = ()
    level: Level = "standard"  # of the domains' problems
    partial: bool = False  # an answer right in part has a part of the reward: domains that know parts, tests of rows
    data: Files = ()
    data_weight: Positive = 1.0
    check: Check = "exact"  # of rows without their own
    thinking: bool | None = None  # left out: as each task's, domain's or row's problems have it
    thinking_share: Share | None = None  # of the tasks' problems with thinking; left out: as each task has them
    efforts: tuple[ModeName, ...] = ()
    effort_domains: Names = ()  # left out: all
    seed: int = 1
    _ladder: Ladder | None = PrivateAttr(None)  # of the model that is asked, once it is known

    @model_validator(mode="after")
    def _check(self) -> ProblemsSection:
        for what, weights, names in (
            ("tasks", self.weights, self.tasks), ("domains", self.domain_weights, self.domains)
        ):  # fmt: skip
            if weights and len(weights) != len(names):
                raise ValueError(f"{len(weights)} weights for {len(names)} {what}; allowed: none, or one each")
        if not self.data:
            self._check_effort_domains()
        if self.effort_domains and not self.efforts:
            raise ValueError(f"effort_domains is {', '.join(self.effort_domains)} without efforts; allowed: none")
        if self.thinking_share is not None and self.thinking is not None:
            raise ValueError(f"thinking_share is {self.thinking_share} beside thinking; allowed: one of them")
        other = [str(name) for name in self.efforts if self.thinking is (name == NON_THINK)]
        if other:
            how = "with" if self.thinking else "without"
            raise ValueError(f"efforts {', '.join(other)} {how} thinking; allowed: thinking left out")
        return self

    def asked(self, rows: Iterable[Problem] = ()) -> tuple[str, ...]:
        """Domains of the problems: tasks, domains, and those of `rows`, the problems of the files."""
        return (*self.tasks, *self.domains, *sorted({row.domain for row in rows}))

    def asked_modes(self, rows: Iterable[Problem] = ()) -> list[tuple[str, Mode | None]]:
        """Each domain of `asked` with each mode that its problems are asked in; None: in no mode."""
        modes = asked_modes(self.efforts) or (None,)
        chosen = self.effort_domains or self.asked(rows)
        return [(name, mode) for name in self.asked(rows) for mode in (modes if name in chosen else (None,))]

    def _check_effort_domains(self, rows: Iterable[Problem] = ()) -> None:
        """ValueError for an effort_domain of which no problem is asked."""
        allowed = self.asked(rows)
        unasked = sorted({*self.effort_domains} - {*allowed})
        if unasked:
            raise ValueError(
                f"effort_domains has {', '.join(unasked)}, which is not asked; allowed: {', '.join(allowed)}"
            )

    def source(self, modes: tuple[EffortMode, ...] = (), rewarded: bool = True) -> ProblemSource:
        """The problems, asked with `modes` if there are any. ValueError for an unknown task or domain, none at all, a
        domain that lacks what it needs, or files without a problem; not `rewarded`: a prompt is one."""
        if modes:
            thinking = self.model_copy(update={"thinking": True})
            asked = EffortProblems(thinking.source(rewarded=rewarded), modes, self.seed)
            return SomeEfforts(self.source((), rewarded), asked, self.effort_domains) if self.effort_domains else asked
        rows = self.rows(rewarded)
        in_rows = any(isinstance(row, TestedProblem) for row in rows)
        if self.partial and not (self.domains or in_rows):
            raise ValueError("partial without domains; allowed: with problems.domains, or with tests in problems.data")
        parts: list[tuple[ProblemSource, float]] = []
        if self.domains:
            chosen = dict(zip(self.domains, self.domain_weights or (1.0,) * len(self.domains), strict=True))
            partial = self.partial and not (in_rows and not {*chosen} & {*PARTIAL})
            domains = DomainProblems(chosen, self.seed, self.thinking, level=self.level, partial=partial)
            parts.append((domains, sum(chosen.values())))
        if self.tasks or not (self.domains or self.data):
            tasks = dict(zip(self.tasks, self.weights or (1.0,) * len(self.tasks), strict=True))
            share = self.thinking_share if self.thinking is None else float(self.thinking)
            parts.append((TaskProblems(tasks, self.seed, share), sum(tasks.values())))
        if self.data:
            self._check_effort_domains(rows)
            parts.append((Rows(rows, self.seed), self.data_weight))
        return mixed(parts, self.seed)

    def rows(self, rewarded: bool = True) -> tuple[RowProblem, ...]:
        """Problems of the files; none without files."""
        if not self.data:
            return ()
        return read_problems(self.data, self.check, self.thinking, rewarded, self._ladder, self.partial)

    def under(self, ladder: Ladder) -> ProblemsSection:
        """The same problems for a model with a ladder of efforts: rows whose effort has no prompt there are refused."""
        found = self.model_copy()
        found._ladder = ladder
        return found

    @property
    def total_weight(self) -> float:
        """Of all that is asked."""
        tasks, domains = (sum(weights or (1.0,) * len(names)) for weights, names in (
            (self.weights, self.tasks), (self.domain_weights, self.domains)
        ))  # fmt: skip
        return tasks + domains + (self.data_weight if self.data else 0.0)
