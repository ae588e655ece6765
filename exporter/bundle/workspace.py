"""The folder an unfinished export works in: what is done is on record, and the bundle appears in one step.

`<output>.partial-<fingerprint>` belongs to one configuration of one checkpoint. Tensors go straight to their places in
the weight file; the journal names a layer after its bytes are on disk, so that whatever a killed export left can be
trusted or is done again. Publishing is a rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.exporter.bundle.plan import WEIGHTS_FILE, WeightPlan
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import MANIFEST_NAME

__all__ = ["Workspace", "check_output", "fingerprint", "put_in_place"]

_JOURNAL = "export.journal"
_LOCK = "export.lock"
_SCRATCH = "scratch"


def fingerprint(*parts: Any) -> str:
    """Return a short hash of JSON-ready data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, but a bundle that may be replaced.

    Raises:
        PmpdError: the folder exists, and `overwrite` is not set or it is no bundle.
    """
    if not output.exists():
        return
    if not overwrite:
        raise PmpdError(f"{output} exists: choose another --output, or replace it with --overwrite")
    if not (output / MANIFEST_NAME).is_file():
        raise PmpdError(f"{output} is no bundle, and --overwrite replaces nothing else: choose another --output")


def put_in_place(folder: Path, output: Path) -> None:
    """Rename a finished bundle to `output`; an older one there is deleted only after that."""
    if output.exists():
        old = output.with_name(f"{output.name}.replaced-{os.getpid()}")
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old)
    else:
        folder.rename(output)


class Workspace:
    """The work folder of one export. Use `Workspace.open`; a second export of the same kind is kept out by a lock."""

    def __init__(self, path: Path, output: Path, plan: WeightPlan) -> None:
        self.path = path
        self.output = output
        self._plan = plan
        self.done: set[str] = set()

    @classmethod
    @contextmanager
    def open(cls, output: Path, mark: str, plan: WeightPlan) -> Iterator[Self]:
        """Open or create the work folder of an export with fingerprint `mark`.

        Raises:
            PmpdError: the folder cannot be made or written, or another export is at work in it.
        """
        path = output.with_name(f"{output.name}.partial-{mark}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PmpdError(f"cannot write to {output.parent} ({error.strerror}): choose another --output") from None
        with (path / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PmpdError(f"another export is writing {path}: wait for it or end it") from None
            workspace = cls(path, output, plan)
            try:
                workspace._prepare()
                yield workspace
            except OSError as error:
                if error.errno is None:  # not from the operating system
                    raise
                raise PmpdError(
                    f"the export stopped in {path} ({error.strerror}): mend that, then run the same command to go on"
                ) from None

    def _prepare(self) -> None:
        weights, journal = self.path / WEIGHTS_FILE, self.path / _JOURNAL
        if weights.exists() and weights.stat().st_size == self._plan.size and journal.exists():
            # A line that a kill cut short has no newline and does not count.
            lines = journal.read_text(encoding="utf-8").split("\n")
            self.done = set(lines[:-1])
            journal.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
        else:
            journal.write_text("", encoding="utf-8")
            with weights.open("wb") as file:
                file.truncate(self._plan.size)

    @property
    def scratch(self) -> Path:
        """A folder for files that do not go into the bundle."""
        folder = self.path / _SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def write(self, step: str, tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> None:
        """Write tensors to their places in the weight file, then put `step` on record."""
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
        self.record(step)

    def record(self, step: str) -> None:
        """Put a step on record whose results are on disk."""
        with (self.path / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{step}\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done.add(step)

    def files(self) -> list[Path]:
        """Return the files of the bundle but its manifest, sorted by name."""
        others = {self.path / name for name in (_JOURNAL, _LOCK, MANIFEST_NAME)}
        files = (file for file in self.path.rglob("*") if file.is_file() and file not in others)
        return sorted(file for file in files if self.path / _SCRATCH not in file.parents)

    def publish(self) -> None:
        """Put the finished bundle in its place; an older one there is deleted only after that."""
        shutil.rmtree(self.path / _SCRATCH, ignore_errors=True)
        put_in_place(self.path, self.output)
        # Not before: without them the work would count for nothing, or another export start in the folder.
        (self.output / _JOURNAL).unlink()
        (self.output / _LOCK).unlink()
