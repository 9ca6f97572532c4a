"""Fixtures of the server's tests, for clients of the outside."""

from tests.server.conftest import folder, server, shared_server

__all__ = ["folder", "server", "shared_server"]
