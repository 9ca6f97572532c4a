"""`dsv4 bench disk_cache`: a long prompt's time to first token, cold, from memory and from disk after a restart.

Every policy has a folder of its own, every restart a process of its own. Loading the model is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.prefix import POLICIES


def measure(model: str | None, folder: Path, window: str, tokens: int, times: int) -> dict[str, float]:
    """Seconds to the first token of `times` requests for one prompt, one after another, in a process that starts."""
    import dsv4

    llm = dsv4.LLM(model, cache_dir=folder, cache_window=window)
    ids = range(100, llm.config.vocab_size - 100)
    prompt = random.Random(1).choices(ids, k=tokens)
    found: dict[str, float] = {}
    for number in range(times):
        begin = time.perf_counter()
        output = llm.generate([prompt], dsv4.SamplingParams(max_tokens=1, temperature=0.0))[0]
        found[f"seconds{number}"] = time.perf_counter() - begin
        found[f"cached{number}"] = output.cached_tokens
    llm.close()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("dsv4 bench disk_cache", description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "WINDOW", "TIMES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        folder, window, times = options.child
        print(json.dumps(measure(options.model, Path(folder), window, options.tokens, int(times))))
        return 0
    rest = ["--tokens", str(options.tokens), *(["--model", options.model] if options.model else [])]
    print("| policy | cold | memory | disk after a restart | of cold | tokens from disk | bytes per token |")
    print("|---|---|---|---|---|---|---|")
    for window in POLICIES:
        with tempfile.TemporaryDirectory() as folder:

            def run(times: int, folder: str = folder, window: str = window) -> dict[str, float]:
                command = [sys.executable, "-m", "benchmarks.disk_cache", *rest, "--child", folder, window, str(times)]
                return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

            first, second = run(2), run(1)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.kv"))
            cold, memory, disk = first["seconds0"], first["seconds1"], second["seconds0"]
            print(f"| `{window}` | {cold:.2f} s | {memory:.3f} s | {disk:.3f} s | {disk / cold:.1%}", end=" ")
            print(f"| {second['cached0']:.0f} | {size / options.tokens:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
