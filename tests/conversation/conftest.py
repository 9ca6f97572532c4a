"""Fixtures: conversations run on the engine tests' stand-in model."""

from ..engine.conftest import text_folder

__all__ = ["text_folder"]
