"""Where a result was measured: processor, versions, and hashes of what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pmpd.runtime import Bundle
from pmpd.runtime.format.bundle import sha256_of
from pmpd.runtime.format.manifest import MANIFEST_NAME

__all__ = ["describe_bundle", "describe_machine", "instruction_sets", "package_versions"]

_VECTORS = ("avx", "fma", "amx", "asimd", "sve", "i8mm", "bf16")
PACKAGES = (
    "pmpd",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum-onnx",
    "rouge-score",
    "sacrebleu",
    "tokenizers",
    "torch",
    "transformers",
)


def describe_machine() -> dict[str, Any]:
    """Return the platform, and the processor with its flags where the system tells."""
    fields: Mapping[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": fields.get("model name") or platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "flags": fields.get("flags") or fields.get("Features", ""),
        },
    }


def instruction_sets() -> list[str]:
    """Return the extensions of the processor that kernels may use, which decide how sums are rounded."""
    flags = describe_machine()["cpu"]["flags"].split()
    return [platform.machine(), *sorted(flag for flag in flags if flag.startswith(_VECTORS))]


def package_versions(*names: str) -> dict[str, str]:
    """Return the versions of packages, default all that a result depends on, of those that are installed."""
    versions = {}
    for name in names or PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return what identifies a bundle; the hash of its manifest stands for all of it, for that lists every file's."""
    manifest = bundle.manifest
    return {
        "name": bundle.path.resolve().name,
        "sha256": sha256_of(bundle.path / MANIFEST_NAME),
        "producer": manifest.producer,
        "model": manifest.source.model,
        "revision": manifest.source.revision,
        "architecture": manifest.architecture.family,
        "parameters": manifest.architecture.parameters,
        "precisions": list(manifest.precisions),
        "prefill_precision": manifest.prefill_precision,
        "context_length": manifest.context_length,
    }
