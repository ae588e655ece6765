"""How many threads to compute with."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

from pmpd.runtime.errors import PmpdError

__all__ = ["MAX_THREADS", "available_threads", "cgroup_quota", "check_threads"]

# Far more than any processor that decoding gains from; ONNX Runtime starts as many as it is told, for minutes.
MAX_THREADS = 1024


def available_threads() -> int:
    """Return how many processors this process may use: its affinity, and the CPU quota of its control group."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return processors if quota is None else max(1, min(processors, math.ceil(quota)))


def check_threads(threads: int) -> int:
    """Return `threads`, or raise PmpdError if it is out of range."""
    if not 1 <= threads <= MAX_THREADS:
        bound = "1 or more" if threads < 1 else f"at most {MAX_THREADS}"
        raise PmpdError(
            f"threads must be {bound}, got {threads}: this process may use {available_threads()} processors"
        )
    return threads


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process's control group, in processors; None where there is none.

    `docker run --cpus 2` and Kubernetes limits set it and leave the affinity alone. Version 2 (``cpu.max``) limits
    every group on the way from the root; of version 1 (``cpu.cfs_quota_us``) the process's group is read.
    """
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, membership = line.partition(":")
        controllers, _, group = membership.partition(":")
        if not group.startswith("/"):
            continue
        path = PurePosixPath(group)
        if not controllers:  # version 2
            for folder in (path, *path.parents):
                limits = root / "sys/fs/cgroup" / folder.relative_to("/") / "cpu.max"
                quota, _, period = _read(limits).partition(" ")
                quotas.append(_ratio(quota, period))
        elif "cpu" in controllers.split(","):
            # Inside a container the group is named as outside, and mounted as the root.
            for place in (path.relative_to("/"), PurePosixPath()):
                limits = root / "sys/fs/cgroup/cpu" / place
                quotas.append(_ratio(_read(limits / "cpu.cfs_quota_us"), _read(limits / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def _ratio(quota: str, period: str) -> float | None:
    try:
        value = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return value if value > 0 else None  # version 1 says -1 for no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
