"""Benchmarks: `dsv4 bench NAME` runs NAME.py; results/ keeps the measurements."""
