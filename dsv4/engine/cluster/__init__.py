"""Engines on several machines, or several on one: replicas of a Ray Serve deployment, with an engine each.

`client.ClusterEngine` has the interface of `AsyncEngine`. The API server stays one process; it sends a request's tokens
to a replica (`replica.py`), chosen by Ray Serve with `router.py` for the prefixes that the replicas hold, and gets a
stream of events back. `connection.py` starts a Ray cluster or joins one. Ray is the extra `cluster`: nothing here
imports it before an engine is started.
"""
