"""The training loop on one of several ranks: sharded model, common decisions, checkpoints of all ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from dsv4.analysis.degrees import Degrees
from dsv4.checkpoint.adapter_files import Pair
from dsv4.model.lora import is_adapter
from dsv4.model.transformer import Transformer
from dsv4.parallel.checkpoint import Checkpoints
from dsv4.parallel.expert import split_experts
from dsv4.parallel.first_rank import first_of_group, patient_group
from dsv4.parallel.fsdp import shard_model
from dsv4.parallel.mesh import make_mesh
from dsv4.parallel.pieces import Values, fill_pieces, gather_tensors
from dsv4.parallel.sums import gather_objects
from dsv4.training.handover import CHECKPOINTS, has_state, pack_run, take_state, unpack_run
from dsv4.training.kept_checkpoints import KeptCheckpoints
from dsv4.training.loop import NonFiniteLossError, Stage, TrainingLoop, TrainSettings
from dsv4.training.lora import adapter_pairs
from dsv4.training.losses import NoTargetsError
from dsv4.training.parts import place_rank
from dsv4.training.plan import Plan
from dsv4.training.processes import Processes
from dsv4.training.rank_optim import RankOptimizer
from dsv4.training.ranks import Ranks
from dsv4.training.replicated_optim import ReplicatedMuonAdamW
from dsv4.training.report import Report
from dsv4.training.sharded_optim import ShardedMuonAdamW
from dsv4.training.speed import SpeedMeter
from dsv4.training.spikes import Spike
from dsv4.training.stability import Kept, SpikeError, Stability
from dsv4.training.state import RunPosition
from dsv4.training.stopping import StopOnSignal


class RankTrainer(TrainingLoop[RankOptimizer]):
    """The loop on one rank of a process group; all ranks build one from the same arguments and run it together.

    `model` is sharded in place. It is on the meta device, and each rank then fills its pieces with `values`, or it is
    whole on every rank. One with adapters is whole, and cut into a pipeline's stages and the ranks' experts alone.
    Only rank 0 reports. The state is in `run_dir`/checkpoints; what one process saved goes there.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: dict[str, Any],
        stages: Sequence[Stage],
        settings: TrainSettings,
        plan: Plan,
        run_dir: Path,
        degrees: Degrees,
        console: Console | None = None,
        quiet: bool = False,
        speed: SpeedMeter | None = None,
        tensorboard: bool = False,
        keep_gathered: bool = False,
        layers: Sequence[int] = (),
        device: torch.device | str = "cpu",
        values: Values | None = None,
    ) -> None:
        """optimizer: keyword arguments of MuonAdamW; keep_gathered: as in shard_model; layers: main layers of each
        pipeline stage, empty: stages of about equal cost. device: of this rank. values: of a run without a state; None:
        `model` has them.

        ValueError if the degrees do not fit ranks, model or settings.
        """
        stability = settings.stability
        if settings.replicas > 1:
            raise ValueError(f"run.replicas {settings.replicas} on several ranks; allowed: 1")
        degrees.check(dist.get_world_size(), model.config.n_routed_experts, model.config.num_hidden_layers)
        self.degrees, self.mesh = degrees, make_mesh(degrees, torch.device(device).type)
        adapted = any(map(is_adapter, model.state_dict()))
        self.checkpoints = Checkpoints(run_dir / CHECKPOINTS, stability.keep if stability else 0)
        first_of_group(lambda: take_state(run_dir, model, optimizer), patient_group())
        self.parts = place_rank(model, self.mesh, layers)
        split_experts(model, self.mesh["expert"])
        if adapted:
            own: RankOptimizer = ReplicatedMuonAdamW(model, self.parts, **optimizer)
        else:
            shard_model(model, self.mesh, keep_gathered)
            if values is not None:
                model.to_empty(device=device)
                if not has_state(run_dir):
                    fill_pieces(model, self.mesh, values)
            copies = self.parts.pipeline.place.copies if self.parts.pipeline is not None else frozenset()
            own = ShardedMuonAdamW(model, self.mesh, copies, **optimizer)
        self._saved = -1  # step of the checkpoint begun last
        super().__init__(model, own, stages, settings, plan, run_dir, console, quiet, speed, tensorboard)

    def run(self, stop_after: int | None = None) -> RunPosition:
        """As TrainingLoop.run."""
        try:
            return super().run(stop_after)
        except (NonFiniteLossError, NoTargetsError, SpikeError):  # on all ranks, which can still write together
            self.checkpoints.finish()
            raise

    def _resume(self) -> None:
        path = self.checkpoints.latest()
        if path is not None:
            self._go_back(path)
            self._saved = self.progress.step
            self._check_stage(path)

    def _go_back(self, path: Path) -> None:
        found, common = self.checkpoints.load(path, self.optimizer.state())
        self.progress, updates = unpack_run(found, common, dist.get_rank(), dist.get_world_size())
        self.optimizer.loaded(updates)
        self._saved = -1

    def _kept(self, count: int) -> Kept:
        return KeptCheckpoints(self.checkpoints)

    def _roll_back(self, stability: Stability, spike: Spike, report: Report, took: float) -> bool:
        self.checkpoints.finish()
        return super()._roll_back(stability, spike, report, took)

    def _report(self) -> Report:
        return super()._report() if dist.get_rank() == 0 else cast(Report, nullcontext(_Silence()))

    def _processes(self) -> Processes:
        sources = [stage.source for stage in self.stages]
        return Ranks(self.model, self.optimizer, sources, self.parts, self.degrees, self.settings.micro_batches)

    def _stop(self) -> StopOnSignal:
        # A rank gets a signal more than once: of a scheduler that signals all processes, and of torchrun, which passes
        # on its own, sends SIGTERM at a second Ctrl-C, and again once another rank has ended. If one rank ended at the
        # second, none would have the checkpoint, or say why it ended.
        return StopOnSignal(ends_at_second=False)

    def _stops(self, stop: StopOnSignal) -> bool:
        flags = torch.tensor([stop.requested, self.checkpoints.writing], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop.requested, writing = map(bool, flags.tolist())
        if not writing:
            self.checkpoints.finish()
        return stop.requested

    @property
    def state_path(self) -> Path:
        return self.run_dir / CHECKPOINTS

    def _save_last(self) -> None:
        super()._save_last()
        self.checkpoints.finish()

    def save(self) -> None:
        """Begin a checkpoint, which is whole before the first step that all ranks begin after they have written it.

        NonFiniteLossError, with nothing written, if a parameter is not finite.
        """
        if not self.optimizer.finite():
            raise NonFiniteLossError(
                f"after step {self.progress.step - 1} a parameter is not finite; nothing was saved"
            )
        if self._saved == self.progress.step:
            return
        self._saved = self.progress.step
        if self.stability:
            self.progress.stability = self.stability.state()
        packed = pack_run(self.progress, self.optimizer.updates, gather_objects(torch.get_rng_state()))
        self.checkpoints.start(self.progress.step, self.optimizer.state(copies=False), *packed)

    def gather_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors one at a time, as parallel/pieces.py:gather_tensors."""
        return gather_tensors(self.model, self.mesh)

    def gather_adapters(self) -> dict[str, Pair]:
        """The adapters of all stages and experts by name of the matrix, on every rank, in the host's memory."""
        # Gathered objects keep their devices, which differ between ranks.
        pairs = {name: Pair(pair.a.cpu(), pair.b.cpu()) for name, pair in adapter_pairs(self.model).items()}
        if self.degrees.expert > 1:
            parts = gather_objects(pairs, self.mesh.get_group("expert"))
            for name in pairs:
                if name.rpartition(".")[0].endswith(".experts"):
                    pairs[name] = Pair(*(torch.cat(both) for both in zip(*(part[name] for part in parts), strict=True)))
        if self.parts.pipeline is None:
            return pairs
        return {name: p for stage in gather_objects(pairs, self.parts.pipeline.group) for name, p in stage.items()}


class _Silence:
    """Report of a rank that does not report."""

    def step(self, *_: object) -> None: ...

    def event(self, *_: object) -> None: ...
