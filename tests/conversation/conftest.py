"""Conversations run on the engine's stand-in model."""

from ..engine.conftest import text_folder

__all__ = ["text_folder"]
