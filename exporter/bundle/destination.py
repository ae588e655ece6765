"""Where a bundle is published: one export at a time, and only what the user saw is ever replaced.

`<output>.partial` belongs to one output. It holds a lock, the unfinished work of exports to that output, and for a
moment the bundle that is being replaced. A bundle is built there and appears at the output by a rename:

1. Everything in the new bundle is flushed to disk.
2. With --overwrite, the old bundle is renamed to `<output>.partial/replaced`. If it is not the folder that stood at the
   output when the export began, it is renamed back, and the export is refused.
3. The new bundle is renamed to the output, which the system refuses if anything is there (but an empty folder).
4. The old bundle is deleted.

A kill between 2 and 3 leaves the old bundle in `replaced`; the next export to this output puts it back before it does
anything else. A kill at any other point leaves either the old or the new bundle at the output.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from pmpd.exporter.bundle.lock import open_locked
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import FORMAT, MANIFEST_NAME

__all__ = ["Destination", "check_output", "work_folder"]

_LOCK = "lock"
_REPLACED = "replaced"
# Errors of a rename whose target exists.
_IN_THE_WAY = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
Identity = tuple[int, ...]


def work_folder(output: Path) -> Path:
    """Return the folder for the unfinished exports to an output."""
    output = output.resolve()
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, *, overwrite: bool) -> Identity | None:
    """Return what tells the bundle at `output` from any other, None if nothing is there.

    Raises:
        PmpdError: something is there and `overwrite` is not set, or it is not a bundle, or this process runs in it.
    """
    if not os.path.lexists(output):
        return None
    if not overwrite:
        raise PmpdError(f"{output} exists: choose another --output, or replace it with --overwrite")
    if not _is_bundle(output):
        raise PmpdError(f"{output} is not a bundle, and --overwrite replaces only bundles: choose another --output")
    if Path.cwd().is_relative_to(output.resolve()):
        raise PmpdError(f"{output} is the current folder or contains it: run from outside the bundle to replace it")
    return _identity(output)


@dataclass(frozen=True)
class Destination:
    """An output that is claimed for one export. Use `Destination.claim`.

    Attributes:
        output: the bundle's folder, absolute, links resolved.
        work: folder for unfinished work, on the same file system.
        replaces: the bundle that may be replaced; None: nothing was there.
    """

    output: Path
    work: Path
    replaces: Identity | None

    @classmethod
    @contextmanager
    def claim(cls, output: Path, *, overwrite: bool) -> Iterator[Self]:
        """Keep every other export away from `output`, and finish or undo an interrupted replacement.

        Raises:
            PmpdError: another export has claimed it, the place cannot be written, or as `check_output`.
        """
        folder = work_folder(output)
        with _lock(folder, output):
            try:
                _put_back(folder / _REPLACED, output)
                yield cls(output.resolve(), folder, check_output(output, overwrite=overwrite))
            finally:
                _remove_if_done(folder)

    def publish(self, bundle: Path) -> None:
        """Move a finished bundle from `work` to the output; see the steps at the top of this file.

        Raises:
            PmpdError: something is at the output that was not there when the export began.
            OSError: the file system refuses.
        """
        _flush(bundle)
        old = self.work / _REPLACED
        if os.path.lexists(self.output):
            if self.replaces is None:
                raise self._occupied()
            self.output.rename(old)
            if _identity(old) != self.replaces:
                old.rename(self.output)
                raise self._occupied()
        try:
            bundle.rename(self.output)
        except OSError as error:
            if old.exists() and not os.path.lexists(self.output):
                old.rename(self.output)
            if error.errno in _IN_THE_WAY:
                raise self._occupied() from None
            raise
        _flush_folder(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _occupied(self) -> PmpdError:
        return PmpdError(
            f"{self.output} was created or changed by another program while the export ran: move it away, or check it "
            f"and add --overwrite, and run the same command again; the finished work is kept in {self.work}"
        )


def _lock(folder: Path, output: Path) -> TextIO:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return open_locked(folder / _LOCK)
        except FileNotFoundError:
            continue  # the previous export has just removed the lock or the folder
        except BlockingIOError:
            raise PmpdError(f"another export is writing {output}: wait for it or end it") from None
        except OSError as error:
            raise PmpdError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from None


def _put_back(old: Path, output: Path) -> None:
    """Undo or complete an interrupted replacement."""
    if not old.exists():
        return
    if not os.path.lexists(output):
        old.rename(output)
    elif _is_bundle(output):
        shutil.rmtree(old)
    else:
        raise PmpdError(f"{old} is an older bundle that an interrupted export moved from {output}: move it elsewhere")


def _remove_if_done(folder: Path) -> None:
    """Delete the work folder if only the lock is left in it."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def _is_bundle(folder: Path) -> bool:
    """Return whether a folder has a bundle's manifest; a damaged bundle is one too."""
    try:
        with (folder / MANIFEST_NAME).open("rb") as file:
            return FORMAT.encode() in file.read(4096)
    except OSError:
        return False


def _identity(folder: Path) -> Identity:
    """Return what tells a bundle from any other: numbers of folder and manifest, and the manifest's size and date.

    Numbers alone do not do: file systems use those of deleted files again.
    """
    stats = [path.stat() for path in (folder, folder / MANIFEST_NAME) if path.exists()]
    place = [number for stat in stats for number in (stat.st_dev, stat.st_ino)]
    return (*place, stats[-1].st_size, stats[-1].st_mtime_ns) if stats else ()


def _flush(bundle: Path) -> None:
    """Put files and folders of a bundle on disk, so that a power failure cannot lose published data."""
    for path in bundle.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _flush_folder(bundle)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
