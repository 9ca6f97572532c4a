"""Limits of the hosted service that clients know, and keep to."""

from __future__ import annotations

MAX_TOKENS = 393_216  # of an answer
MAX_STOPS = 16
MAX_ALTERNATIVES = 20  # of a token's log-probability
