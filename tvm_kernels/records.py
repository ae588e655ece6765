"""Tuned choices, one file an instruction set in ``records/``: what `pmpd-tune` found and where it found it."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from pmpd.tvm_kernels.isa import ISAS, Isa
from pmpd.tvm_kernels.kernel import Accuracy, Phase, Tuning

__all__ = ["default_tuning", "load_records", "tuning"]

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "records"


def default_tuning(isa: Isa, bits: int, accuracy: Accuracy, phase: Phase) -> Tuning:
    """Return choices that are sound anywhere, from the number of vector registers alone."""
    wide = isa.registers >= 32
    rows = 1 if bits >= 7 else 2
    if phase == "gemv":
        return Tuning(rows=rows, prefetch=1024)
    if accuracy == "int8":
        return Tuning(rows=4 if wide else 2, tokens=3 if wide else 2, depth=4)
    return Tuning(rows=4 if wide else 2, tokens=6 if wide else 4, depth=1)


@lru_cache
def load_records(isa: str) -> dict[str, Any]:
    """Return the record file of an instruction set: `cpu`, `shapes`, and `kernels` by key; empty if there is none."""
    path = FOLDER / f"{isa}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def tuning(isa: Isa, bits: int, accuracy: Accuracy, phase: Phase) -> Tuning:
    """Return the tuned choices of a kernel; without a record those of the nearest one, and the log says so.

    The nearest is the same kernel of another instruction set with vectors of the same width and as many registers.
    """
    key = f"{phase}-{accuracy}-{bits}"
    for near in (isa, *(other for other in ISAS if (other.width, other.registers) == (isa.width, isa.registers))):
        found = load_records(near.name).get("kernels", {}).get(key)
        if found is not None:
            if near is not isa:
                log.info("no record of %s for %s: taking that of %s", key, isa.name, near.name)
            return Tuning(**found["tuning"])
    log.info("no record of %s for %s or its like: taking safe defaults", key, isa.name)
    return default_tuning(isa, bits, accuracy, phase)
