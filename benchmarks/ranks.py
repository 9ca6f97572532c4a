"""Seconds per training step on two gloo ranks against two replicas that share memory, step by step in turns.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m dsv4 bench ranks
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m dsv4 bench ranks --hidden 512 --experts 16 --rounds 5

The model is nano, or nano with other sizes; a step is one row of random tokens per process. Of each kind the median
wall time and the median processor time of all its processes: on a shared machine the latter is the steadier figure,
though it counts the waiting of neither.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from dsv4.config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="dsv4 bench ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    nano = ModelConfig.preset("nano")
    parser.add_argument("--hidden", type=int, default=nano.hidden_size)
    parser.add_argument("--layers", type=int, default=nano.num_hidden_layers)
    parser.add_argument("--experts", type=int, default=nano.n_routed_experts)
    parser.add_argument("--tokens", type=int, default=512, help="of a row, one per process and step")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    layers = options.layers
    ratios = (*nano.compress_ratios[:layers], *nano.compress_ratios[nano.num_hidden_layers :])
    config = replace(
        nano, hidden_size=options.hidden, n_routed_experts=options.experts, num_hidden_layers=layers,
        compress_ratios=ratios, num_hash_layers=min(layers, nano.num_hash_layers),
    )  # fmt: skip
    import torch

    from benchmarks.harness.rank_steps import compare  # after the help, as these import torch
    from dsv4.parallel.mesh import process_group

    torch.set_num_threads(1)
    with process_group():
        compare(config, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
