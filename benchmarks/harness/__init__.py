"""Harness of the benchmarks: contenders in separate processes, interleaved rounds, saved rows."""
