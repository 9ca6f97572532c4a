"""The last few good states of a run, one file each, to roll back to."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dsv4.checkpoint.atomic import clear_folder, new_file

_NAME = re.compile(r"step-(\d{9})\.pt")


class KeptStates:
    """Files `folder`/step-000000120.pt, at most `count`; a newer one replaces the oldest.

    A kept state is another name (a hard link) of the run's saved state: it takes no time to write, and its bytes are
    its own only once the run has saved again. On file systems without links it is a copy.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        if folder.is_dir():
            clear_folder(folder)

    def steps(self) -> list[int]:
        """Steps of the kept states, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def keep(self, state: Path, step: int) -> None:
        """Keep the saved state `state`, of a run at `step`, and remove the oldest beyond `count`."""
        self.folder.mkdir(exist_ok=True)
        target = self.path(step)
        target.unlink(missing_ok=True)
        try:
            os.link(state, target)
        except OSError:
            with new_file(target, state.stat().st_size) as temporary:
                shutil.copyfile(state, temporary)
        for old in self.steps()[: -self.count]:
            self.path(old).unlink()

    def drop_after(self, step: int) -> None:
        """Remove the states of later steps: the run has left the way that led to them."""
        for later in self.steps():
            if later > step:
                self.path(later).unlink()
