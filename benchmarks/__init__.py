"""Measurements of this repository: `dsv4 bench NAME` runs NAME.py, results/ keeps the rows."""
