"""Tuned choices, one file an instruction set in ``records/``: what `pmpd-tune` found and where it found it.

A file is JSON: `isa`, `cpu`, `threads`, `date`, `shapes` (``8192x2048``), and `kernels`, which holds, by a kernel's key
(``gemv-int8-4``), its `tuning` and what it reached: `gbs` and `of_read` of a GEMV, `gmacs` of a GEMM.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pmpd.runtime.errors import PmpdError
from pmpd.tvm_kernels.isa import ISAS, Isa
from pmpd.tvm_kernels.kernel import Accuracy, Kernel, Phase, Tuning

__all__ = ["RECORDS", "default_tuning", "key_of", "load_records", "save_records", "tuning"]

log = logging.getLogger(__name__)

# The records of this repository.
RECORDS = Path(__file__).parent / "records"


def key_of(kernel: Kernel) -> str:
    """Return the key of a kernel in its instruction set's file."""
    return _key(kernel.bits, kernel.accuracy, kernel.phase)


def _key(bits: int, accuracy: Accuracy, phase: Phase) -> str:
    return f"{phase}-{accuracy}-{bits}"


def default_tuning(isa: Isa, bits: int, accuracy: Accuracy, phase: Phase) -> Tuning:
    """Return choices that are sound anywhere, from the number of vector registers alone."""
    wide = isa.registers >= 32
    rows = 1 if bits >= 7 else 2
    if phase == "gemv":
        return Tuning(rows=rows, prefetch=1024)
    if accuracy == "int8":
        return Tuning(rows=4 if wide else 2, tokens=3 if wide else 2, depth=4)
    return Tuning(rows=4 if wide else 2, tokens=6 if wide else 4, depth=1)


def load_records(isa: str, folder: Path = RECORDS) -> dict[str, Any]:
    """Return the records of an instruction set in a folder; empty if there are none.

    Raises:
        PmpdError: the file is not one of records.
    """
    path = folder / f"{isa}.json"
    if not path.exists():
        return {}
    try:
        records: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for found in records["kernels"].values():
            Tuning(**found["tuning"])
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise PmpdError(f"{path} is no file of tuning records ({error!r}): delete it and run `pmpd-tune`") from None
    return records


def save_records(records: Mapping[str, Any], folder: Path) -> None:
    """Write the records of an instruction set into a folder; the file appears whole, or the old one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{records['isa']}.json"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def tuning(isa: Isa, bits: int, accuracy: Accuracy, phase: Phase, *, folder: Path | None = None) -> Tuning:
    """Return the tuned choices of a kernel; without a record those of the nearest one, and the log says so.

    The nearest is the same kernel of another instruction set with vectors of the same width and as many registers. A
    user's `folder` of records comes before the repository's.

    Raises:
        PmpdError: a file is not one of records.
    """
    key = _key(bits, accuracy, phase)
    folders = [RECORDS] if folder is None else [folder, RECORDS]
    for near in (isa, *(other for other in ISAS if (other.width, other.registers) == (isa.width, isa.registers))):
        for place in folders:
            if (found := load_records(near.name, place).get("kernels", {}).get(key)) is not None:
                if near is not isa:
                    _say(f"{isa.name}: no tuning records of its own, taking those of {near.name}")
                return Tuning(**found["tuning"])
    _say(f"{isa.name}: no tuning records for {phase} {accuracy}, nor of its like: taking safe defaults")
    return default_tuning(isa, bits, accuracy, phase)


@lru_cache
def _say(message: str) -> None:
    """Log a message the first time."""
    log.info(message)
