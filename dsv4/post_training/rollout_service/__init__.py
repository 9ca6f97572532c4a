"""Rollouts by many engine workers, any of which may be killed at any time: a durable queue, a log of every token."""
