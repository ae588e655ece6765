"""What tells the unfinished work of one export from that of another: its choices, its model, and the code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pmpd.runtime.format.bitplanes

__all__ = ["CALIBRATION_CODE", "WEIGHTS_CODE", "code_digest", "fingerprint"]

_EXPORTER = Path(__file__).parents[1]
# The code that decides a statistic, and the code that decides the bytes of `weights.bin`. What checks a bundle, writes
# graphs or talks to the user is not among it: a change there keeps hours of work.
CALIBRATION_CODE = (_EXPORTER / "calibrate",)
WEIGHTS_CODE = (
    *CALIBRATION_CODE,
    _EXPORTER / "arch",
    _EXPORTER / "nn",
    _EXPORTER / "quantize",
    _EXPORTER / "tune",
    _EXPORTER / "bundle" / "coarse.py",
    _EXPORTER / "bundle" / "layers.py",
    _EXPORTER / "bundle" / "plan.py",
    _EXPORTER / "source" / "folder.py",
    _EXPORTER / "source" / "gguf",
    _EXPORTER / "source" / "text_model.py",
    Path(pmpd.runtime.format.bitplanes.__file__),
)


def fingerprint(*parts: Any) -> str:
    """Return a short hash of JSON-ready data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def code_digest(places: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) of code and texts at some places: files, or folders with all that is below."""
    digest = hashlib.sha256()
    for place in places:
        below = (path for path in place.rglob("*") if path.suffix in (".py", ".c", ".jsonl"))
        for file in [place] if place.is_file() else sorted(below):
            digest.update(file.relative_to(place.parent).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
