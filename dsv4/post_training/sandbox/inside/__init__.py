"""Trusted code that runs inside a sandbox: standard library only, for nothing else is there."""
