"""Progress reporting of a run: metrics.jsonl, and a progress bar or plain lines with the time left."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dsv4.checkpoint.atomic import new_file, space_in_words
from dsv4.training.tensorboard import open_writer, write_metrics

PLAIN_LINE_EVERY = 20
PACE_STEPS = 50
# Figures of the live line by their key in the metrics, in this order, where a step has them.
FIGURES: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {value:.3f}",
    "accuracy": lambda value: f"acc {value:.3f}",
    "reward": lambda value: f"reward {value:.3f}",
    "kl": lambda value: f"kl {value:.3f}",
    "train_serve_difference": lambda value: f"train-serve {value:.0e}" if value else "train-serve 0",
    "lr": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{value:.0f} tok/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "peak_memory_bytes": lambda value: f"{value / 1e9:.1f} GB",
}
# Those that go, one after the other, where a terminal is too narrow for all.
LEAST_FIRST = ("lr", "accuracy", "tokens_per_second", "mfu", "loss")
GAP = "  "
NARROWEST_BAR, WIDEST_BAR = 4, 40


def format_seconds(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_before(line: str, first_step: int, attempt: int) -> bool:
    """True if `line` is a complete record of an earlier attempt, or of a step before `first_step` in this one.

    A kill or a full disk may have cut it.
    """
    try:
        record = json.loads(line)
        return (record.get("attempt", 0), record["step"]) < (attempt, first_step)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def describe_step(metrics: dict[str, Any], left: str, width: int | None = None) -> str:
    """A step's figures and the time left as one line, of at most `width` columns if it can be; None: all figures."""
    shown = {key: words(metrics[key]) for key, words in FIGURES.items() if key in metrics} | {"left": f"left {left}"}
    for least in LEAST_FIRST:
        if width is None or len(GAP.join(shown.values())) <= width:
            break
        shown.pop(least, None)
    return GAP.join(shown.values())


class Pace:
    """Time left by the last PACE_STEPS steps: what an earlier process or a busier hour took does not count."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)

    def time_left(self, done: int, seconds: float, total: int) -> str:
        """As format_seconds; "?" after the first step. `seconds`: that the run's `done` steps have taken."""
        if self._marks and done <= self._marks[-1][0]:
            self._marks.clear()  # the run went back
        self._marks.append((done, seconds))
        first, since = self._marks[0]
        if done == first:
            return format_seconds(0.0) if done >= total else "?"
        return format_seconds((total - done) * (seconds - since) / (done - first))


class Report:
    """Appends one JSON line per step to `path` and shows progress on the terminal. Use as a context manager.

    `first_step` is the step at which the run (re)starts: lines of later steps, left by a killed run, are dropped.
    attempt: rollbacks so far; lines of earlier attempts stay, whatever their step.
    `tensorboard`: event files too, in the folder of that name beside `path`.
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        console: Console | None = None,
        quiet: bool = False,
        tensorboard: bool = False,
        attempt: int = 0,
    ) -> None:
        self.console = console or Console()
        self.quiet = quiet
        self._path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = "".join(line + "\n" for line in lines if _is_before(line, first_step, attempt))
        with new_file(path) as temporary:
            temporary.write_text(kept, encoding="utf-8")
        self._writer = open_writer(path.parent / "tensorboard", first_step) if tensorboard else None
        self._file = path.open("ab", buffering=0)  # unbuffered: close() has nothing to write after an error
        self._pace = Pace()
        self._bar: Progress | None = None
        self._bar_column = BarColumn(NARROWEST_BAR)
        self._task: Any = None

    def __enter__(self) -> Report:
        if self.console.is_terminal and not self.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), self._bar_column, MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def event(self, record: dict[str, Any], words: str) -> None:
        """Record something other than a finished step, with its step and attempt, and say it on the terminal."""
        with space_in_words(self._path):
            self._file.write((json.dumps(record) + "\n").encode())
        if not self.quiet:
            self.console.print(words, highlight=False)

    def step(self, metrics: dict[str, Any], total_steps: int, planned: bool) -> None:
        """Record one step; `metrics` must hold stage, step, lr, seconds (of the run so far) and tokens_per_second.

        What a step did not measure is not in its metrics, and not on the terminal; what has no room is not shown.
        """
        with space_in_words(self._path):
            self._file.write((json.dumps(metrics) + "\n").encode())
        if self._writer is not None:
            write_metrics(self._writer, metrics)
        done = metrics["step"] + 1
        left = self._pace.time_left(done, metrics["seconds"], total_steps) if planned else "?"
        stage, counts = metrics["stage"], f"{done}/{total_steps if planned else '?'}"
        if self._bar:
            room = self.console.width - len(f"{stage}  {counts} ")
            note = describe_step(metrics, left, room - NARROWEST_BAR)
            self._bar_column.bar_width = min(WIDEST_BAR, max(NARROWEST_BAR, room - len(note)))
            total = total_steps if planned else None
            self._bar.update(self._task, description=stage, completed=done, total=total, note=note)
        elif not self.quiet and (done % PLAIN_LINE_EVERY == 0 or done == total_steps):
            # Whole, whatever the width: a log has none.
            line = f"{stage} {counts}  {describe_step(metrics, left)}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
