"""The targets: kinds of machine that a bundle may have kernels for, and which machine loads which."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["MACHINES", "Machine", "check_target", "machine_targets"]


@dataclass(frozen=True)
class Machine:
    """What the libraries of a target run on, in the words of the module `platform`: ``Linux`` and ``x86_64``."""

    system: str
    architecture: str


# By target: the name of `pmpd-export --target` and of the folder in a bundle, ``kernels/<target>/``. Of the targets of
# one machine the best comes first. A library holds the kernels of the levels below its own and takes what the processor
# has when it is loaded, so every x86-64 machine runs every x86-64 library. How each is compiled is in
# `tvm_kernels/targets.py`.
MACHINES = {
    "x86-64-v4": Machine("Linux", "x86_64"),
    "x86-64-v3": Machine("Linux", "x86_64"),
    "aarch64-linux": Machine("Linux", "aarch64"),
}


def machine_targets() -> tuple[str, ...]:
    """Return the targets whose libraries this machine loads, best first; empty where there are none."""
    here = Machine(platform.system(), platform.machine())
    return tuple(target for target, machine in MACHINES.items() if machine == here)


def check_target(name: str) -> str:
    """Return `name` if it is a target; raise PmpdError with the list of targets if not."""
    if name not in MACHINES:
        raise PmpdError(unknown_choice("target", name, MACHINES))
    return name
