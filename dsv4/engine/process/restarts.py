"""Restarts of a crashed engine: after a pause that doubles, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0


@dataclass
class RestartPolicy:
    """`max_crashes` crashes in a row are followed by a start; after the next one it is given up.

    A process that has served for `sound_seconds` before it crashed begins a new row.
    """

    max_crashes: int = 5
    sound_seconds: float = 300.0
    num_crashes: int = 0  # in a row

    def pause_after_crash(self, served_seconds: float) -> float | None:
        """Seconds to wait before the next start; None: no further one. `served_seconds`: 0 where it never loaded."""
        if served_seconds >= self.sound_seconds:
            self.num_crashes = 0
        self.num_crashes += 1
        if self.num_crashes > self.max_crashes:
            return None
        return min(FIRST_PAUSE_SECONDS * 2 ** (self.num_crashes - 1), LONGEST_PAUSE_SECONDS)
