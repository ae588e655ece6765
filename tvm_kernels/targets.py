"""The machines that operator libraries are built for."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["TARGETS", "Target", "find_target", "host_target", "local_target"]


@dataclass(frozen=True)
class Target:
    """A kind of machine that one library serves.

    Attributes:
        name: as in ``pmpd-export --target`` and in a bundle, ``kernels/<name>/libpmpd_ops.so``.
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


def _linux(name: str, arch: str, baseline: str, *isa: str) -> Target:
    return Target(name, arch, f"{arch}-linux-gnu", f"{arch}-linux-gnu.2.17", baseline, isa)


TARGETS = {
    target.name: target
    for target in (
        _linux("x86-64-v4", "x86_64", "x86-64", "avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2"),
        _linux("x86-64-v3", "x86_64", "x86-64", "avxvnni", "avx2"),
        _linux("aarch64-linux", "aarch64", "armv8-a", "dotprod", "neon"),
    )
}


def find_target(name: str) -> Target:
    """Return the target of a name.

    Raises:
        PmpdError: there is none.
    """
    if name not in TARGETS:
        raise PmpdError(unknown_choice("target", name, TARGETS))
    return TARGETS[name]


def host_target() -> str | None:
    """Return the target whose library serves this machine best, or None where none serves it.

    Every x86-64 machine runs the largest library: it chooses among its kernels when it is loaded.
    """
    if sys.platform != "linux":
        return None
    return next((target.name for target in TARGETS.values() if target.arch == platform.machine()), None)


def local_target() -> Target:
    """Return the target of this machine.

    Raises:
        PmpdError: there is none.
    """
    name = host_target()
    if name is None:
        raise PmpdError(f"there are no kernels for {sys.platform} on {platform.machine()}: use Linux on x86-64 or Arm")
    return find_target(name)
