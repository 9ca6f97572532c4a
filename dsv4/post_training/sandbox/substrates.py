"""Choice of a sandbox's substrate."""

from collections.abc import Mapping
from typing import Literal, get_args

from dsv4.post_training.sandbox import namespaces
from dsv4.post_training.sandbox.interface import Sandbox
from dsv4.post_training.sandbox.limits import Limits

Substrate = Literal["namespaces"]
SUBSTRATES: tuple[Substrate, ...] = get_args(Substrate)


def open_sandbox(
    substrate: Substrate = "namespaces", limits: Limits | None = None, *, readable: Mapping[str, str] | None = None
) -> Sandbox:
    """New sandbox with empty /work. `readable`: path inside -> folder of the machine that commands may read.

    SandboxError where this machine lacks what the substrate needs, with the name of what is missing.
    """
    if substrate not in SUBSTRATES:
        raise ValueError(f"unknown substrate {substrate!r}; known are {', '.join(SUBSTRATES)}")
    return namespaces.NamespaceSandbox(limits, readable=readable)


def missing(substrate: Substrate) -> str | None:
    """Reason why the substrate gives no sandbox on this machine; None where it does."""
    if substrate not in SUBSTRATES:
        raise ValueError(f"unknown substrate {substrate!r}; known are {', '.join(SUBSTRATES)}")
    return namespaces.missing()
