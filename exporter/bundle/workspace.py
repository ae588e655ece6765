"""The folder of an unfinished export: a journal of finished steps, and the bundle, which one rename publishes.

`<output>.partial/<fingerprint>` belongs to one configuration of one checkpoint; its `bundle/` is the bundle being
written. Tensors are written at their final offsets in the weight file, and the journal names a layer once its bytes
are on disk. A killed export therefore resumes from the journal, and anything not in it is done again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.exporter.bundle.destination import Destination, work_folder
from pmpd.exporter.bundle.plan import WEIGHTS_FILE, WeightPlan
from pmpd.runtime.console.output import byte_text
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import MANIFEST_NAME, Tensor

__all__ = ["PROBE_PREFIX", "Workspace", "bytes_on_disk"]

log = logging.getLogger(__name__)
_JOURNAL = "journal"
_BUNDLE = "bundle"
# Temporary graphs that the verification writes next to the weights and deletes after loading.
PROBE_PREFIX = ".probe-"


def bytes_on_disk(output: Path, name: str) -> int:
    """Return the bytes that the weight file of unfinished work with fingerprint `name` takes; it may have holes."""
    file = work_folder(output) / name / _BUNDLE / WEIGHTS_FILE
    if not file.exists():
        return 0
    stat = file.stat()
    return 512 * stat.st_blocks if hasattr(stat, "st_blocks") else stat.st_size


class Workspace:
    """The work folder of one export. Use `Workspace.open`.

    Attributes:
        folder: holds the journal and the bundle.
        path: the bundle being written.
        done: the steps in the journal, and what they noted: JSON-ready data.
    """

    def __init__(self, folder: Path, destination: Destination, plan: WeightPlan) -> None:
        self.folder = folder
        self.path = folder / _BUNDLE
        self.done: dict[str, Any] = {}
        self._destination = destination
        self._plan = plan

    @classmethod
    @contextmanager
    def open(cls, output: Path, name: str, plan: WeightPlan, *, overwrite: bool) -> Iterator[Self]:
        """Claim the output, and open or create the work folder of an export with fingerprint `name`.

        Raises:
            PmpdError: the output is taken or claimed by another export, or the work folder cannot be written.
        """
        with Destination.claim(output, overwrite=overwrite) as destination:
            folder = destination.work / name
            try:
                workspace = cls(folder, destination, plan)
                workspace._prepare()
                yield workspace
            except OSError as error:
                if error.errno is None:  # not from the operating system
                    raise
                raise PmpdError(
                    f"the export stopped in {folder} ({error.strerror}): fix the cause, then run the same command "
                    "to resume"
                ) from None

    def _prepare(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for probe in self.path.glob(f"{PROBE_PREFIX}*"):  # of a verification that was killed
            probe.unlink()
        weights, journal = self.path / WEIGHTS_FILE, self.folder / _JOURNAL
        if journal.exists() and weights.exists() and weights.stat().st_size == self._plan.size:
            # A line that a kill cut short has no newline and does not count. Whole lines are never written again.
            whole = journal.read_bytes().rpartition(b"\n")
            os.truncate(journal, len(whole[0]) + len(whole[1]))
            lines = (line.partition("\t") for line in whole[0].decode(errors="replace").splitlines())
            self.done = {step: json.loads(note or "null") for step, _, note in lines}
        else:
            journal.write_bytes(b"")
            with weights.open("wb") as file:
                file.truncate(self._plan.size)
        for other in self._destination.work.iterdir():
            if other == self.folder or not other.is_dir():
                continue
            if (other / _BUNDLE).exists():
                size = byte_text(bytes_on_disk(self._destination.output, other.name))
                log.info("note      %s (%s) is an unfinished export: delete it if unwanted", other, size)
            else:  # a kill between publication and this
                shutil.rmtree(other)

    def write(self, step: str, tensors: Iterable[tuple[str, npt.NDArray[Any]]], *, note: Any = None) -> None:
        """Write tensors to their places in the weight file, then put `step` on record with a note."""
        with (self.path / WEIGHTS_FILE).open("r+b") as file:
            for name, array in tensors:
                place = self._plan.tensors[name]
                if array.shape != place.shape or array.dtype != np.dtype(place.dtype):
                    raise PmpdError(
                        f"tensor {name!r} came out as {array.dtype} {list(array.shape)} "
                        f"instead of {place.dtype} {list(place.shape)}: the checkpoint does not fit its config.json"
                    )
                file.seek(place.offset)
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            os.fsync(file.fileno())
        self.record(step, note=note)

    def read(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor of the weight file, which a finished step has written."""
        with (self.path / WEIGHTS_FILE).open("rb") as file:
            file.seek(tensor.offset)
            return np.frombuffer(file.read(tensor.length), tensor.dtype).reshape(tensor.shape)

    def keep(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep a step's result whole before parts of it replace what it was made from. A kill does not harm it."""
        file = self._kept(name)
        unfinished = file.with_suffix(".partial")
        with unfinished.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # names are no options of it
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(file)

    def kept(self, name: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return what `keep` has kept under a name, None if nothing."""
        file = self._kept(name)
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    def _kept(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def record(self, step: str, *, note: Any = None) -> None:
        """Put a step on record whose results are on disk, with a note: JSON-ready data."""
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{step}\n" if note is None else f"{step}\t{json.dumps(note)}\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done[step] = note

    def files(self) -> list[Path]:
        """Return the files of the bundle but its manifest, sorted by name."""
        manifest = self.path / MANIFEST_NAME
        return sorted(file for file in self.path.rglob("*") if file.is_file() and file != manifest)

    def publish(self) -> None:
        """Move the finished bundle to the output, and delete what is left of the work."""
        self._destination.publish(self.path)
        shutil.rmtree(self.folder, ignore_errors=True)
