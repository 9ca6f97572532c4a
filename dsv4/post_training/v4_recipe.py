"""The whole recipe: one file with the budget, the base, the specialists, the student, comparisons and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from dsv4.analysis.precision import Precision
from dsv4.data.stable_hash import stable_hash
from dsv4.data.tasks import TASKS
from dsv4.post_training.domains.domain import Level
from dsv4.post_training.effort_keys import EffortsSection
from dsv4.post_training.effort_names import EFFORTS, EffortName, has_budgets
from dsv4.post_training.key_types import Count, Positive, Share
from dsv4.post_training.recipes import DistillRecipe, GRPORecipe, PolicyRecipe
from dsv4.tokenizer.prompts import Ladder
from dsv4.training.nano_recipe import PARTS, NanoRecipe
from dsv4.training.recipe import Section, read_recipe
from dsv4.training.run_shards import read_share

DOMAINS = ("mathematics", "code", "tools", "instructions")

CURVE = (1, 25, 50, 75, 100)  # budgets at which a student of budgets is evaluated
P = TypeVar("P", bound=PolicyRecipe)
S = TypeVar("S", bound=Section)
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]


class BudgetSection(Section):
    """Seconds of the whole run, and the shares of its stages; those of specialists are for all domains together.

    `specialist_grpo` is for the general tasks too. `rest` is what comparisons, evaluation and stages of given steps are
    expected to take: their length is given by tokens, questions and steps. What the shares leave of 1 is for data,
    starts and exports, which no stage counts.
    """

    seconds: Positive = 21600.0
    base: Share = 0.20
    sft: Share = 0.05
    specialist_sft: PositiveShare = 0.03
    specialist_grpo: PositiveShare = 0.06
    student_sft: Share = 0.12
    student: PositiveShare = 0.10
    rest: Share = 0.42

    @model_validator(mode="after")
    def _check(self) -> BudgetSection:
        total = sum(self._shares().values())
        if total > 1.0 + 1e-9:
            raise ValueError(f"the shares add up to {total:.3f}; allowed: 1 at most")
        return self

    def of(self, name: str) -> float:
        """Seconds of a share."""
        return self.seconds * getattr(self, name)

    def without(self, left_out: Sequence[str]) -> BudgetSection:
        """The same seconds for the other stages alone: each gets as much more as its share."""
        shares = self._shares()
        factor = sum(shares.values()) / sum(share for name, share in shares.items() if name not in left_out)
        return self.model_copy(
            update={name: 0.0 if name in left_out else share * factor for name, share in shares.items()}
        )

    def _shares(self) -> dict[str, float]:
        return {name: value for name, value in self if name != "seconds"}


class TuningSection(Section):
    """Fine-tuning on conversations: the keys of `dsv4 train sft` that the recipe sets, but for its length."""

    rate: Positive = 1e-3
    max_tokens: Count = 1024  # longer conversations are refused
    row_tokens: Count = 4096
    batch_tokens: Count = 4096  # of a step
    precision: Precision = "bf16"
    save_every: Count = 50

    def _settings(self, device: str) -> list[str]:
        return [
            *("--max-tokens", str(self.max_tokens), f"optimizer.rate={self.rate:g}", f"run.device={device}"),
            *(f"run.precision={self.precision}", f"run.save_every={self.save_every}"),
            *(f"stages.0.row_tokens={self.row_tokens}", f"stages.0.batch_tokens={self.batch_tokens}"),
        ]


class MixedSection(TuningSection):
    """Fine-tuning for comparison, as long as the runs that it is compared with."""

    def words(self, device: str, tokens: int) -> list[str]:
        """Arguments of `dsv4 train sft` on `tokens` tokens."""
        return [*self._settings(device), f"stages.0.tokens={tokens}"]


class FineTuningSection(TuningSection):
    """Fine-tuning of a length of its own, or of the budget's."""

    seconds: Positive | None = None  # left out: `steps`, or else the budget's
    steps: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> FineTuningSection:
        if self.seconds is not None and self.steps is not None:
            raise ValueError(f"seconds is {self.seconds:g} and steps is {self.steps}; allowed: one of the two")
        return self

    @property
    def has_length(self) -> bool:
        """True if the section gives its length itself."""
        return self.seconds is not None or self.steps is not None

    def words(self, device: str) -> list[str]:
        """Arguments of `dsv4 train sft`."""
        if self.steps is None:
            return [*self._settings(device), f"run.seconds={self.seconds:g}"]
        return [*self._settings(device), f"stages.0.tokens={self.steps * self.batch_tokens}"]


class StudentTuningSection(FineTuningSection):
    """The student's fine-tuning: what its base has learned is kept by parts of the corpus, and tasks, in the mixture.

    `texts`: PART=SHARE of the tokens, parts of nano's data (`data/nano/build.py:NanoData`), documents cut at
    `row_tokens`; used if the run has a corpus. `tasks`: share of conversations of the tasks (`data/tasks`).
    """

    texts: tuple[str, ...] = ()
    tasks: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def shares(self) -> dict[str, float]:
        """Share of each part. ValueError for one that is no share, and where nothing is left for conversations."""
        found = dict(map(read_share, self.texts))
        if (total := sum(found.values()) + self.tasks) >= 1.0:
            raise ValueError(f"student_sft.texts and student_sft.tasks add up to {total:g}; allowed: less than 1")
        return found

    def mixture_words(self, samples: Path, texts: Mapping[Path, float]) -> list[str]:
        """Arguments of `dsv4 train sft` whose conversations go to the shards in `samples`, beside shares of others."""
        if not (texts or self.tasks):
            return []
        folders = {samples: 1.0 - sum(texts.values()) - self.tasks} | dict(texts)
        shards = [f"{folder.absolute()}={share:.6g}" for folder, share in folders.items()]
        words = [f"data.shards={json.dumps(shards)}", f"data.tasks={self.tasks:.6g}"]
        return [*words, f"stages.0.sequence={self.row_tokens}"] if texts else words


class SpecialistSection(Section):
    """A domain: its conversations, then GRPO on its problems; `weight` is its teacher's in distillation.

    `time`: its part of the specialists' seconds, beside the others'.
    `efforts`: the domain's problems are asked with one of them, and with thinking; none: as each problem has it.
    """

    conversations: Count = 4000
    efforts: tuple[EffortName, ...] = ()
    weight: Positive = 1.0
    time: Positive = 1.0

    @property
    def thinking(self) -> bool | None:
        """Mode of the domain's problems; None leaves it to them."""
        return True if self.efforts else None

    sft: FineTuningSection = FineTuningSection()
    grpo: GRPORecipe = GRPORecipe()


class SpecialistsSection(Section):
    mathematics: SpecialistSection = SpecialistSection()
    code: SpecialistSection = SpecialistSection()
    tools: SpecialistSection = SpecialistSection()
    instructions: SpecialistSection = SpecialistSection()

    def items(self) -> Iterator[tuple[str, SpecialistSection]]:
        return ((name, getattr(self, name)) for name in DOMAINS)


class GeneralSection(Section):
    """Tasks of no specialist that the student is asked too, their teacher the model that it began with, after GRPO.

    So it keeps what that can do, and gains what GRPO adds. A share of 0 leaves both out.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3  # of the student's problems
    thinking_share: Share | None = None  # of these with thinking; left out: as each task has them
    weight: Positive = 1.0  # of that teacher
    time: Positive = 1.0  # as a specialist's
    grpo: GRPORecipe = GRPORecipe()

    @property
    def asked(self) -> bool:
        return bool(self.share and self.tasks)

    def problems(self) -> dict[str, Any]:
        """Tasks and their weights beside domains of weight 1 each."""
        if not self.asked:
            return {}
        weight = len(DOMAINS) * self.share / (1.0 - self.share) / len(self.tasks)
        weights = (weight,) * len(self.tasks)
        return {"tasks": self.tasks, "weights": weights, "thinking_share": self.thinking_share}


class EvaluationSection(Section):
    """Held-out questions, answered greedily."""

    questions: Count = 200  # of each domain, to each model
    max_tokens: Count = 512  # of an answer, or of a turn of an episode
    seed: int = 1
    effort_domain: str = "mathematics"
    efforts: tuple[EffortName, ...] = EFFORTS

    @model_validator(mode="after")
    def _check(self) -> EvaluationSection:
        if self.effort_domain not in DOMAINS:
            raise ValueError(f"effort_domain is {self.effort_domain}; allowed: {', '.join(DOMAINS)}")
        return self


class V4Recipe(Section):
    """A whole run. `base_model`, `sft_model`: model folders in place of the base and of its sft.

    `start`: the model that specialists, the student and the comparisons begin with; `ladder`: its prompts of efforts.
    `student_sft`: fine-tuning of the student on all specialists' conversations before distillation; without a length of
    its own and a share of the budget there is none.
    """

    device: str = "cpu"
    seed: int = 1
    base_model: str | None = None
    sft_model: str | None = None
    start: Literal["base", "sft"] = "sft"
    ladder: Ladder = "0731"
    level: Level = "standard"  # of the domains' problems
    budget: BudgetSection = BudgetSection()
    nano: NanoRecipe = NanoRecipe()
    specialists: SpecialistsSection = SpecialistsSection()
    mixed: MixedSection = MixedSection()
    general: GeneralSection = GeneralSection()
    student_sft: StudentTuningSection = StudentTuningSection()
    student: DistillRecipe = DistillRecipe()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _check(self) -> V4Recipe:
        asked = {f"specialists.{name}": one.efforts for name, one in self.specialists.items()}
        for name, efforts in (asked | {"evaluation": self.evaluation.efforts}).items():
            if has_budgets(efforts) and self.ladder != "scalar":
                raise ValueError(f"{name}.efforts has budgets, and ladder is {self.ladder}; allowed: scalar")
        for name, one in self.specialists.items():
            given = one.grpo.efforts
            if has_budgets(one.efforts) and given.penalty == "mode" and "penalty" in given.model_fields_set:
                raise ValueError(f"specialists.{name}.grpo.efforts.penalty is mode with budgets; allowed: budget, none")
        return self

    @property
    def data_seed(self) -> int:
        """Seed of the conversations, another than the problems': GRPO is to ask what fine-tuning has not answered."""
        return stable_hash("conversations", self.seed)

    def resolve(self) -> V4Recipe:
        """The same run with the budget's seconds, problems and device written out in every section."""
        budget = self.budget.without(self._given())
        tuning = {name: one.time for name, one in self.specialists.items() if not one.sft.has_length}
        specialists: dict[str, SpecialistSection] = {}
        times = sum(one.time for _, one in self.specialists.items()) + self.general.asked * self.general.time
        second = budget.of("specialist_grpo") / times  # of GRPO, for a `time` of 1
        for name, section in self.specialists.items():
            sft = section.sft
            if name in tuning:
                part = section.time / sum(tuning.values())
                sft = sft.model_copy(update={"seconds": budget.of("specialist_sft") * part})
            efforts = {"efforts": section.efforts}
            grpo = self._grpo(section.grpo, second * section.time, (name,), efforts)
            if has_budgets(section.efforts):
                grpo = grpo.model_copy(update={"efforts": _filled(grpo.efforts, {"penalty": "budget"})})
            specialists[name] = section.model_copy(update={"sft": sft, "grpo": grpo})
        thinkers = {name: section.efforts for name, section in self.specialists.items() if section.efforts}
        efforts = {"efforts": tuple({effort: None for found in thinkers.values() for effort in found})}
        asked = efforts | {"effort_domains": tuple(thinkers)} | self.general.problems()
        student_sft = self.student_sft
        if budget.student_sft and not student_sft.has_length:
            student_sft = student_sft.model_copy(update={"seconds": budget.of("student_sft")})
        student = self._policy(self.student, budget.of("student"), DOMAINS, asked)
        evaluation = self.evaluation
        if any(map(has_budgets, thinkers.values())):
            evaluation = _filled(evaluation, {"efforts": CURVE})
        general = self._grpo(self.general.grpo, second * self.general.time, (), {"tasks": self.general.tasks})
        return self.model_copy(
            update={
                "budget": budget,
                "nano": self._nano(budget),
                "specialists": self.specialists.model_copy(update=specialists),
                "general": self.general.model_copy(update={"grpo": general}),
                "student_sft": student_sft,
                "student": student,
                "evaluation": evaluation,
            }
        )

    def _given(self) -> list[str]:
        """Stages that a model folder stands for."""
        return [name for name in ("base", "sft") if getattr(self, f"{name}_model") is not None]

    def _nano(self, budget: BudgetSection) -> NanoRecipe:
        """Recipe of the base and its sft, with their seconds and the device. ValueError for one without seconds."""
        nano = self.nano
        update: dict[str, Any] = {}
        for part in PARTS:
            recipe = getattr(nano, part)
            update[part] = recipe.model_copy(update={"run": self._run(recipe.run)})
        if nano.steps is None:
            seconds = {part: budget.of(part) for part in ("base", "sft") if part not in self._given()}
            if not all(seconds.values()):
                part = min(seconds, key=lambda name: seconds[name])
                raise ValueError(f"budget.{part} is 0; allowed: more, or {part}_model")
            if seconds:
                update["seconds"] = sum(seconds.values())
            if "base" in seconds and "sft" in seconds:
                share = seconds["sft"] / update["seconds"]
                before = nano.sft_share + nano.long_share
                tuned = {name: getattr(nano, name) / before * share for name in ("sft_share", "long_share")}
                update |= {"mid_share": nano.mid_share / (1 - before) * (1 - share), **tuned}
        return nano.model_copy(update=update)

    def _grpo(self, recipe: GRPORecipe, seconds: float, domains: tuple[str, ...], asked: dict[str, Any]) -> GRPORecipe:
        """As `_policy`; without efforts that are asked, the recipe's windows and penalties go."""
        found = self._policy(recipe, seconds, domains, asked)
        return found if found.problems.efforts else found.model_copy(update={"efforts": EffortsSection()})

    def _policy(self, recipe: P, seconds: float, domains: tuple[str, ...], asked: dict[str, Any]) -> P:
        """Recipe of GRPO or of distillation; a length, problems or a device that it gives stay."""
        run, problems = self._run(recipe.run), recipe.problems
        if run.seconds is None and "steps" not in run.model_fields_set:
            run = run.model_copy(update={"seconds": seconds})
        if not problems.domains and not problems.tasks and not problems.data:
            problems = _filled(problems, {"domains": domains, "seed": self.seed, "level": self.level, **asked})
        return recipe.model_copy(update={"run": run, "problems": problems})

    def _run(self, run: S) -> S:
        """A section `run` with the device and the seed of the whole, unless it gives its own."""
        return _filled(run, {"device": self.device, "seed": self.seed})


def _filled(section: S, values: dict[str, Any]) -> S:
    """The section with values of keys that it does not give itself."""
    return section.model_copy(
        update={key: value for key, value in values.items() if key not in section.model_fields_set}
    )


def read_v4_recipe(path: Path, nano: Path, keys: list[str]) -> V4Recipe:
    """Recipe in the file `path`, with the base's and its sft's in the file `nano`, after overrides; resolved.

    A file that has them itself, as the one that a run writes, needs no other. RecipeError for what cannot be read.
    """
    prefix = "nano."
    recipe = read_recipe(V4Recipe, path, [key for key in keys if not key.startswith(prefix)])
    if "nano" in recipe.model_fields_set:
        return read_recipe(V4Recipe, path, keys).resolve()
    base = read_recipe(NanoRecipe, nano, [key.removeprefix(prefix) for key in keys if key.startswith(prefix)])
    return recipe.model_copy(update={"nano": base}).resolve()
