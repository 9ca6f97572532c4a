"""Ray's modules, imported when they are needed. They have no types here: CI checks this package without Ray."""

from __future__ import annotations

import importlib
import os
from typing import Any

MISSING = "a cluster needs Ray, which is not installed: in the repository, .venv/bin/pip install '.[cluster]'"

# Ray reads these when it is imported; they hold for its processes too.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_enable_metrics_collection": "0",  # the server has its own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# For a cluster of this machine alone: on the loopback interface, and for holders of the token in ~/.ray alone.
_LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


class ClusterError(OSError):
    """Ray is missing, its cluster does not answer, or the replicas cannot be started."""


def ray_module(name: str, local: bool = False) -> Any:
    """A module of Ray by its full name. ClusterError naming the extra if Ray is not installed.

    `local`: for a cluster of this machine alone; counts in the first call.
    """
    for variable, value in (_ENVIRONMENT | (_LOCAL_ENVIRONMENT if local else {})).items():
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != "ray":
            raise ClusterError(f"{MISSING} (the module {error.name} is missing)") from error
        raise ClusterError(MISSING) from error
