"""Choice of a sandbox's substrate."""

import os
from collections.abc import Mapping
from typing import Literal, cast, get_args

from dsv4.post_training.sandbox import container, microvm, namespaces
from dsv4.post_training.sandbox.interface import Sandbox
from dsv4.post_training.sandbox.limits import Limits

Substrate = Literal["namespaces", "container", "microvm"]
SUBSTRATES: tuple[Substrate, ...] = get_args(Substrate)
VARIABLE = "DSV4_SANDBOX"


def chosen(substrate: Substrate | None = None) -> Substrate:
    """The given substrate; else that of the environment variable DSV4_SANDBOX; else namespaces."""
    found, source = (substrate, "") if substrate is not None else (os.environ.get(VARIABLE) or "namespaces", VARIABLE)
    if found not in SUBSTRATES:
        place = f" in {source}" if source else ""
        raise ValueError(f"unknown substrate {found!r}{place}; known are {', '.join(SUBSTRATES)}")
    return cast(Substrate, found)


def open_sandbox(
    substrate: Substrate | None = None,
    limits: Limits | None = None,
    *,
    readable: Mapping[str, str] | None = None,
    image: str | None = None,
) -> Sandbox:
    """New sandbox with empty /work. `readable`: path inside -> folder of the machine that commands may read.

    `image`: of a container, its name; of a virtual machine, a folder with its root. Without one, files of this machine.
    SandboxError where this machine lacks what the substrate needs, with the name of what is missing.
    """
    match chosen(substrate):
        case "container":
            return container.ContainerSandbox(limits, readable=readable, image=image)
        case "microvm":
            return microvm.MicrovmSandbox(limits, readable=readable, image=image)
        case "namespaces":
            if image is not None:
                raise ValueError(f"image is {image!r}; namespaces have none, a container or a microvm has")
            return namespaces.NamespaceSandbox(limits, readable=readable)


def missing(substrate: Substrate | None = None) -> str | None:
    """Reason why the substrate (None: the chosen one) gives no sandbox on this machine; None where it does."""
    modules = {"namespaces": namespaces, "container": container, "microvm": microvm}
    return modules[chosen(substrate)].missing()
