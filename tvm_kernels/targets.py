"""How the operator library of each target is compiled. The list of targets is `pmpd.runtime.format.targets`."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.targets import MACHINES, check_target, machine_targets

__all__ = ["TARGETS", "Target", "find_target", "host_target", "local_target"]


@dataclass(frozen=True)
class Target:
    """A kind of machine that one library serves.

    Attributes:
        name: as in the list of targets.
        arch: as `platform.machine` calls it.
        triple: LLVM's name of the platform.
        zig: that of the zig compiler: glibc 2.17 (2012, the first with aarch64) or any later one will do.
        baseline: the least processor of the architecture, as gcc and clang call it. Only kernels use more.
        isa: instruction sets that the library has kernels for, best first, named as in ``PMPD_MAX_ISA``. A machine
            without them runs the portable version.
    """

    name: str
    arch: str
    triple: str
    zig: str
    baseline: str
    isa: tuple[str, ...]


# By target: the least processor, and the instruction sets.
_FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "x86-64-v4": ("x86-64", ("avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2")),
    "x86-64-v3": ("x86-64", ("avxvnni", "avx2")),
    "aarch64-linux": ("armv8-a", ("dotprod", "neon")),
}


def _linux(name: str, arch: str) -> Target:
    baseline, isa = _FLAGS[name]
    return Target(name, arch, f"{arch}-linux-gnu", f"{arch}-linux-gnu.2.17", baseline, isa)


TARGETS = {name: _linux(name, machine.architecture) for name, machine in MACHINES.items()}


def find_target(name: str) -> Target:
    """Return the target of a name.

    Raises:
        PmpdError: there is none.
    """
    return TARGETS[check_target(name)]


def host_target() -> str | None:
    """Return the target whose library serves this machine best, or None where none serves it."""
    return next(iter(machine_targets()), None)


def local_target() -> Target:
    """Return the target of this machine.

    Raises:
        PmpdError: there is none.
    """
    name = host_target()
    if name is None:
        raise PmpdError(
            f"there are no kernels for {platform.system()} on {platform.machine()}: use Linux on x86-64 or Arm"
        )
    return find_target(name)
