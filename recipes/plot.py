"""Draw the losses, learning rate and speed of runs: losses.png in each run's folder.

python recipes/plot.py runs/pretrain
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv4.training.plots import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Draw every run given; 0 when the pictures are written."""
    for folder in _parser().parse_args(arguments).run_dir:
        try:
            picture = draw_run(folder)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if picture is None:
            raise SystemExit("matplotlib is not installed; in the repository, pip install '.[train]'")
        print(picture)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recipes/plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder with a run's metrics.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
