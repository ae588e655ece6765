"""The bundle's operator libraries, one per target: built first, so that a missing compiler is noticed early."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from pmpd.exporter.bundle.workspace import Workspace
from pmpd.runtime.console.progress import track
from pmpd.tvm_kernels import build_library

__all__ = ["build_kernels", "built_kernels"]


def build_kernels(targets: Sequence[str], precisions: Sequence[int], head_dim: int, workspace: Workspace) -> None:
    """Build a library per target for some precisions (bits), unless an earlier run has built it.

    Raises:
        MissingExtraError: TVM or a compiler is not installed.
        PmpdError: a library cannot be built.
    """
    built = built_kernels(targets, workspace)
    _remove_others(workspace.path, current={workspace.path / file for file in built.values()})
    for target in targets:
        if target in built:
            continue
        file = workspace.path / _file(target)

        def progress(done: Iterable[str], total: int, step: str = _step(target)) -> Iterator[str]:
            return track(done, step=step, total=total)

        build_library(target, precisions=precisions, head_dims=[head_dim], output=file, progress=progress)
        with file.open("r+b") as library:
            os.fsync(library.fileno())
        workspace.record(_step(target))


def built_kernels(targets: Sequence[str], workspace: Workspace) -> dict[str, str]:
    """Return the libraries that have been built: paths within the bundle by target."""
    return {
        target: _file(target)
        for target in targets
        if _step(target) in workspace.done and (workspace.path / _file(target)).exists()
    }


def _remove_others(folder: Path, *, current: Container[Path]) -> None:
    """Delete libraries for other targets than now, and what a killed run has left of one."""
    for file in (folder / "kernels").glob("*/*"):
        if file not in current:
            file.unlink()


def _step(target: str) -> str:
    return f"kernels {target}"


def _file(target: str) -> str:
    return f"kernels/{target}/libpmpd_ops.so"
