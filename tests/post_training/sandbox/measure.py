"""Seconds of a sandbox's start and of a command in it: python -m tests.post_training.sandbox.measure SUBSTRATE..."""

import statistics
import sys
import time
from collections.abc import Callable

from dsv4.post_training.sandbox.substrates import chosen, open_sandbox

STARTS, COMMANDS = 5, 20


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    for name in sys.argv[1:]:
        substrate = chosen(name)  # type: ignore[arg-type]
        starts = [seconds(lambda substrate=substrate: open_sandbox(substrate).close()) for _ in range(STARTS)]
        with open_sandbox(substrate) as box:
            commands = [seconds(lambda box=box: box.exec(["true"])) for _ in range(COMMANDS)]
        print(f"{name}: start and end {statistics.median(starts):.2f}, command {statistics.median(commands):.3f}")


if __name__ == "__main__":
    main()
