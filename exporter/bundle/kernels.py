"""The bundle's operator libraries, one per target: made before all else, so that what is missing is known early."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from pmpd.exporter.bundle.workspace import Workspace
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import MissingExtraError
from pmpd.tvm_kernels import build_library, host_target

__all__ = ["build_kernels", "built_kernels", "wanted_targets"]

log = logging.getLogger(__name__)


def wanted_targets(targets: Sequence[str] | None) -> tuple[str, ...]:
    """Return the targets to build for; by default that of this machine, if there is one."""
    if targets is not None:
        return tuple(targets)
    host = host_target()
    return () if host is None else (host,)


def build_kernels(
    targets: Sequence[str] | None, precisions: Sequence[int], head_dim: int, workspace: Workspace, *, quiet: bool
) -> None:
    """Build a library per target for some precisions (bits), but those that an earlier run has built.

    Where no targets are given, a missing TVM or compiler is no error: the bundle then has its portable graphs alone.

    Raises:
        MissingExtraError: targets are given, and TVM or a compiler is not installed.
        PmpdError: a library cannot be built.
    """
    built = built_kernels(targets, workspace)
    _remove_others(workspace.path, keep={workspace.path / file for file in built.values()})
    try:
        for target in wanted_targets(targets):
            if target in built:
                continue
            file = workspace.path / _file(target)

            def progress(done: Iterable[str], total: int, step: str = _step(target)) -> Iterator[str]:
                return track(done, step=step, total=total, quiet=quiet)

            build_library(target, precisions=precisions, head_dims=[head_dim], output=file, progress=progress)
            with file.open("r+b") as library:
                os.fsync(library.fileno())
            workspace.record(_step(target))
    except MissingExtraError as error:
        if targets is not None:
            raise
        log.warning("kernels   skipped, the bundle will run slowly: %s, then export again with --overwrite", error)


def built_kernels(targets: Sequence[str] | None, workspace: Workspace) -> dict[str, str]:
    """Return the libraries that have been built: paths within the bundle by target."""
    return {
        target: _file(target)
        for target in wanted_targets(targets)
        if _step(target) in workspace.done and (workspace.path / _file(target)).exists()
    }


def _remove_others(folder: Path, *, keep: Container[Path]) -> None:
    """Delete libraries for other targets than now, and what a killed run has left of one."""
    for file in (folder / "kernels").glob("*/*"):
        if file not in keep:
            file.unlink()


def _step(target: str) -> str:
    return f"kernels {target}"


def _file(target: str) -> str:
    return f"kernels/{target}/libpmpd_ops.so"
