"""Sandboxes for programs that a model wrote: one interface, its substrates, a pool, a log with replay, unit tests."""
