"""GRPO in processes of their own: dsv4's GRPORun, and TRL's GRPOTrainer with transformers' generation.

All have one model, the same prompts, group size, answer length and updates per step. An answer does not end early.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from time import perf_counter, process_time
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.harness.process import peak_bytes
from benchmarks.harness.sums import Sums

MUON, ADAMW, TRL = "dsv4", "dsv4 adamw", "trl"
RATE = 1e-5  # learning rate
CLIP = 1.0
Clock = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """One step: prompts, answers per prompt, tokens per answer, updates."""

    prompts: int
    group: int
    tokens: int
    updates: int

    @property
    def answers(self) -> int:
        return self.prompts * self.group

    @property
    def sampled(self) -> int:
        """Tokens that a step samples."""
        return self.answers * self.tokens


@dataclass(frozen=True)
class Took:
    """One step: seconds of rollouts with their rewards and of updates, sampled tokens, peak bytes of the process.

    difference: the largest |log p| between sampling and the first update, of a token; None if it was not watched.
    """

    rollouts: float
    updates: float
    tokens: int
    peak: int
    difference: float | None


class Contender(Protocol):
    def step(self, number: int, watched: bool) -> Took:
        """Sample and update once. `watched`: sampling's log-probabilities are kept, even where that costs time."""
        ...


class Dsv4:
    """GRPORun. With Muon: as `dsv4 train grpo` runs, in stored weights (FP4, FP8); with AdamW: all in fp32, as TRL."""

    def __init__(self, folder: Path, scratch: Path, shape: Shape, adamw: bool, clock: Clock) -> None:
        import dsv4
        from dsv4.engine import SamplingParams
        from dsv4.post_training.grpo import GRPOSettings
        from dsv4.post_training.grpo_run import GRPORunSettings
        from dsv4.post_training.learner import LearnerSettings
        from dsv4.post_training.policy_run import LoopSettings
        from dsv4.post_training.recipe_run import freeze_router
        from dsv4.post_training.rewards import RewardSettings
        from dsv4.post_training.served_policy import ServedPolicy
        from dsv4.training.newton_schulz import product_dtype
        from dsv4.training.optim import MuonAdamW
        from dsv4.training.schedule import Schedule

        model = dsv4.load(folder, weights="widened").requires_grad_()
        model.mtp.requires_grad_(False)
        if not adamw:
            freeze_router(model)
        optimizer: Any = PlainAdamW(model)
        if not adamw:
            optimizer = MuonAdamW(model, model.config, compute_dtype=product_dtype(torch.device("cpu")))
        policy = ServedPolicy(
            model, folder, quantized=not adamw, max_num_seqs=shape.answers, max_model_len=1024 + shape.tokens
        )
        learner = LearnerSettings(GRPOSettings(kl=0.0), grad_clip=CLIP, quantized=not adamw)
        settings = GRPORunSettings(
            learner, RewardSettings(judge_cut_off=True), shape.group, shape.updates,
            sampling=SamplingParams(ignore_eos=True),
        )  # fmt: skip
        loop = LoopSettings(10**6, Schedule(RATE, 0, 0.0), shape.prompts, shape.tokens, save_every=10**6)
        self._run = _clocked(clock)(policy, optimizer, Sums(), loop, settings, scratch, quiet=True)

    def step(self, number: int, watched: bool) -> Took:
        run, before = self._run, self._run.position.tokens
        assert run.position.problems == number * run.loop.prompts, "a group of equal rewards was replaced"
        run.run(run.position.step + 1)
        last = (run.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        difference = json.loads(last)["train_serve_difference"]
        return Took(run.sampling, run.whole - run.sampling, run.position.tokens - before, peak_bytes(), difference)


def _clocked(clock: Clock) -> Any:
    """GRPORun with the seconds of its last step, without writing its state: `whole`, and `sampling` of them."""
    from dsv4.post_training.grpo_run import GRPORun
    from dsv4.post_training.policy_run import StepFigures

    class Clocked(GRPORun):
        whole = sampling = 0.0

        @contextmanager
        def _sampling(self) -> Iterator[Any]:
            before = clock()
            with super()._sampling() as sampler:
                yield sampler
            self.sampling = clock() - before

        def step(self, rate: float) -> StepFigures:
            before = clock()
            figures = super().step(rate)
            self.whole = clock() - before
            return figures

    return Clocked


class PlainAdamW:
    """torch's AdamW behind what a run uses of MuonAdamW."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adamw = torch.optim.AdamW(self._parameters, lr=RATE, weight_decay=0.0, foreach=True)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def zero_grad(self) -> None:
        self._adamw.zero_grad()

    def gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(self._gradients(), foreach=True))

    def step(self, rate: float, grad_scale: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = rate
        for gradient in self._gradients():
            gradient.mul_(grad_scale)
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return self._adamw.state_dict()


class Trl:
    """GRPOTrainer with dsv4's objective: no KL, no scaling by the deviation, means per answer, the same clipping.

    `packages`: folder of TRL's packages. The router's auxiliary loss is off: TRL 1.16 reads `num_experts` for it, which
    DeepSeek V4's config in transformers has not. Activations are kept, as dsv4's are.
    """

    def __init__(self, folder: Path, scratch: Path, shape: Shape, packages: Path, clock: Clock) -> None:
        import site

        site.addsitedir(str(packages))  # behind the others, so that torch and transformers are those of all contenders
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig  # pyright: ignore

        self._clock, self._shape = clock, shape
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = GRPOConfig(
            output_dir=str(scratch), use_cpu=True, bf16=False, seed=1, optim="adamw_torch", learning_rate=RATE,
            lr_scheduler_type="constant", max_grad_norm=CLIP, activation_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            per_device_train_batch_size=shape.answers // shape.updates, steps_per_generation=shape.updates,
            gradient_accumulation_steps=1, max_steps=shape.updates, num_generations=shape.group,
            max_completion_length=shape.tokens, loss_type="grpo", scale_rewards="none", epsilon_high=0.28, beta=0.0,
            router_aux_loss_coef=0.0,
        )  # fmt: skip
        self._prompts = Prompts(folder)
        self._trainer = _trainer(clock)(
            model, _rewards, args=config, train_dataset=self._dataset(0), processing_class=tokenizer
        )
        self._trainer.never_end()

    def _dataset(self, number: int) -> Any:
        from datasets import Dataset  # pyright: ignore

        first = number * self._shape.prompts
        return Dataset.from_list(
            [{"prompt": self._prompts.text(place)} for place in range(first, first + self._shape.prompts)]
        )

    def step(self, number: int, watched: bool) -> Took:
        trainer = self._trainer
        trainer.train_dataset = self._dataset(number)
        trainer.start_step(watched)
        trainer.train()
        asked = range(number * self._shape.prompts, (number + 1) * self._shape.prompts)
        assert trainer.asked == [ids for place in asked for ids in [self._prompts.ids(place)] * self._shape.group]
        difference = trainer.difference if watched else None
        return Took(trainer.sampling, trainer.whole - trainer.sampling, trainer.tokens, peak_bytes(), difference)


def _rewards(completions: Sequence[str], **_: Any) -> list[float]:
    from benchmarks.harness.sums import reward_of

    return [reward_of(text) for text in completions]


class Prompts:
    """Prompts of the questions as dsv4 renders them."""

    def __init__(self, folder: Path) -> None:
        from dsv4.tokenizer import Tokenizer
        from dsv4.tokenizer.prompts import PromptEncoder

        self._tokenizer = Tokenizer.from_pretrained(folder)
        self._encoder = PromptEncoder(self._tokenizer)

    def ids(self, number: int) -> list[int]:
        return self._encoder.encode(Sums().problem(number).prompt())

    def text(self, number: int) -> str:
        return self._tokenizer.decode(self.ids(number))


def _trainer(clock: Clock) -> Any:
    """GRPOTrainer with the seconds of the last call of `train`, and what it asked and sampled."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer  # pyright: ignore

    class Clock(TrainerCallback):
        started = ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = clock()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended = clock()

    class Clocked(GRPOTrainer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.times = Clock()
            self.add_callback(self.times)
            self.remove_callback(PrinterCallback)
            self.start_step(False)

        def never_end(self) -> None:
            """Sample every answer to its greatest length: the token that ends one is none of the vocabulary."""
            self.eos_token_ids = [len(self.processing_class)]
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

        def start_step(self, watched: bool) -> None:
            self.watched, self.sampling, self.difference, self.tokens = watched, 0.0, 0.0, 0
            self.asked: list[list[int]] = []
            self._drawn: dict[tuple[int, ...], Tensor] = {}
            self._first = self._step

        @property
        def whole(self) -> float:
            return self.times.ended - self.times.started

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            before = clock()
            found = super()._generate_and_score_completions(inputs)
            self.sampling += clock() - before
            return found

        def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
            self.asked += [list(ids) for ids in prompt_ids]
            with self._noting() if self.watched else nullcontext():
                found = super()._generate_single_turn(prompt_ids, *arguments, **named)
            self.tokens += sum(len(ids) for ids in found[0])
            return found

        @contextmanager
        def _noting(self) -> Iterator[None]:
            """Context in which generation notes the log-probabilities of what it draws."""
            generate = self.model.generate

            def noting(**asked: Any) -> Tensor:
                found = generate(**asked, return_dict_in_generate=True, output_logits=True)
                drawn = found.sequences[:, -len(found.logits) :]
                log_p = torch.stack(found.logits, 1).float().log_softmax(-1)
                log_p = log_p.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
                self._drawn = {tuple(ids.tolist()): row for ids, row in zip(drawn, log_p, strict=True)}
                return found.sequences

            self.model.generate = noting
            try:
                yield
            finally:
                self.model.generate = generate

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **named: Any
        ) -> Any:
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **named
            )
            if self.watched and torch.is_grad_enabled() and self._step == self._first:
                for ids, row in zip(input_ids[:, -logits_to_keep:], found[0].detach(), strict=True):
                    apart = (row - self._drawn[tuple(ids.tolist())]).abs().max()
                    self.difference = max(self.difference, float(apart))
            return found

    return Clocked


_contenders: dict[str, Contender] = {}  # of this process


def load(name: str, folder: Path, scratch: Path, shape: Shape, busy: bool, packages: Path | None) -> None:
    """Load a contender in its process, with its run in `scratch`, which is emptied.

    busy: seconds are of processor time. packages: TRL's.
    """
    rmtree(scratch, ignore_errors=True)
    clock = process_time if busy else perf_counter
    with torch.inference_mode(False), torch.enable_grad():
        if name == TRL:
            assert packages is not None
            _contenders[name] = Trl(folder, scratch, shape, packages, clock)
        else:
            _contenders[name] = Dsv4(folder, scratch, shape, name == ADAMW, clock)


def run(name: str, number: int, watched: bool) -> Took:
    """One step on the questions of that number."""
    with torch.inference_mode(False), torch.enable_grad():
        return _contenders[name].step(number, watched)
