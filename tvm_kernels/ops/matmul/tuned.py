"""Tuning records, one file per instruction set in ``records/``: what `pmpd-tune` found, and on which machine.

A file is JSON: `isa`, `cpu`, `threads`, `date`, `shapes` (``8192x2048``), and `kernels`, which holds, by a kernel's key
(``gemv-int8-4``), its `tuning` and what it reached: `gbs` and `of_read` of a GEMV, `gmacs` of a GEMM.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from pmpd.runtime.console.output import write_atomically
from pmpd.runtime.errors import PmpdError
from pmpd.tvm_kernels.codegen.isa import ISAS, Isa, isa_named
from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES, Accuracy, MatmulKernel, Phase
from pmpd.tvm_kernels.ops.matmul.tuning import Tuning
from pmpd.tvm_kernels.targets import Target

__all__ = ["RECORDS", "default_tuning", "key_of", "load_records", "save_records", "tuned_kernels", "tuning"]

log = logging.getLogger(__name__)

# The records of this repository.
RECORDS = Path(__file__).parent / "records"


def key_of(kernel: MatmulKernel) -> str:
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
        PmpdError: the file does not hold records.
    """
    path = folder / f"{isa}.json"
    if not path.exists():
        return {}
    try:
        records: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for record in records["kernels"].values():
            Tuning(**record["tuning"])
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise PmpdError(f"{path} is not a file of tuning records ({error!r}): delete it and run `pmpd-tune`") from None
    return records


def save_records(records: Mapping[str, Any], folder: Path) -> None:
    """Write the records of an instruction set into a folder; the file appears whole, or the old one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{records['isa']}.json", json.dumps(records, indent=1) + "\n")


def tuning(isa: Isa, bits: int, accuracy: Accuracy, phase: Phase, *, folder: Path | None = None) -> tuple[Tuning, str]:
    """Return the tuned choices of a kernel, and where they come from: an instruction set's name, or `defaults`.

    Without a record they are those of the nearest one, the same kernel of another instruction set with vectors of the
    same width and as many registers. A user's `folder` of records comes before the repository's.

    Raises:
        PmpdError: a file does not hold records.
    """
    folders = [RECORDS] if folder is None else [folder, RECORDS]
    for near in (isa, *(other for other in ISAS if (other.width, other.registers) == (isa.width, isa.registers))):
        for place in folders:
            record = load_records(near.name, place).get("kernels", {}).get(_key(bits, accuracy, phase))
            if record is not None:
                return Tuning(**record["tuning"]), near.name
    return default_tuning(isa, bits, accuracy, phase), "defaults"


def tuned_kernels(
    target: Target,
    isas: Iterable[str],
    *,
    precisions: Iterable[int],
    accuracies: Iterable[Accuracy] = ACCURACIES,
    folder: Path | None = None,
) -> list[MatmulKernel]:
    """Return kernels of both phases, each with its `tuning`; one line of the log says how many are without a record.

    Raises:
        PmpdError: a file does not hold records.
    """
    kernels: list[MatmulKernel] = []
    borrowed: Counter[str] = Counter()
    phases: tuple[Phase, ...] = ("gemv", "gemm")
    for name, bits, accuracy, phase in product(isas, precisions, accuracies, phases):
        choices, source = tuning(isa_named(name), bits, accuracy, phase, folder=folder)
        kernels.append(MatmulKernel(isa=isa_named(name), bits=bits, accuracy=accuracy, phase=phase, tuning=choices))
        if source != name:
            borrowed[f"{name} from {source}"] += 1
            log.debug("%s: no tuning record of %s, using %s", name, _key(bits, accuracy, phase), source)
    if borrowed:
        log.info(
            "%s: %d of %d kernels have no tuning record and use another's (%s): run `pmpd-tune` on such a machine",
            target.name,
            borrowed.total(),
            len(kernels),
            ", ".join(f"{count} {whose}" for whose, count in borrowed.items()),
        )
    return kernels
