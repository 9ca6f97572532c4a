"""Logs of episodes' environments in a run's folder, until the run has saved what it learned from them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path


class SessionLogs:
    """Folder of logs: one folder for each call of problems, named by the number of the first of them.

    A run that was killed asks the problems behind its saved state again, with the same seeds: its episodes find the
    logs of those that were cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, first: int) -> Path:
        """Folder of the episodes of a call of problems."""
        return self.folder / str(first)

    def keep(self, first: int) -> None:
        """Remove the logs of problems before number `first`: a saved state has learned from them."""
        for path in self.folder.glob("*"):
            if path.name.isdecimal() and int(path.name) < first:  # a file system may have put others there
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
