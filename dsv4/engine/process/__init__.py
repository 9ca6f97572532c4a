"""The engine in a process of its own: a crash of the model ends its requests, not the server.

`client.EngineProcess` has the interface of `AsyncEngine` and starts `worker`, where the real one runs. Messages
(`messages.py`) go over a pair of sockets; a process that has crashed is started again (`restarts.py`).
"""
