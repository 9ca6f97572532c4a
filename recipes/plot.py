"""Draw the losses, learning rate and speed of runs: losses.png in each run's folder."""

from __future__ import annotations

import sys

from dsv4.commands.recipe_flags import parse
from dsv4.training.plots import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Draw every run given; 0 when the pictures are written."""
    for folder in parse("plot", arguments).run_dir:
        try:
            picture = draw_run(folder)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if picture is None:
            raise SystemExit("matplotlib is not installed; in the repository, pip install '.[train]'")
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
