"""A schedule that was found becomes part of its bundle, at once or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pmpd.runtime import Bundle
from pmpd.runtime.console.output import write_atomically
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import MANIFEST_NAME, FileEntry, Manifest

__all__ = ["check_name", "publish"]

FOLDER = "schedules"
# Files that only `publish` writes: reports and networks, and drafts of them and of the manifest (`write_atomically`).
WRITTEN = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}\.(json|onnx)|\.[A-Za-z0-9._-]+-[0-9a-f]{8}\.(json|onnx)\.\d+")
DRAFT = re.compile(rf"\.{re.escape(MANIFEST_NAME)}\.\d+")


def check_name(manifest: Manifest, name: str) -> None:
    """Raise PmpdError unless a bundle can have a schedule of this name."""
    try:
        replace(manifest, schedules={**manifest.schedules, name: "uniform:1"})
    except PmpdError:
        raise PmpdError(f"schedule name {name!r:.60}: use letters, digits, '.', '_' and '-'") from None


def publish(bundle: Bundle, name: str, schedule: str | bytes, report: str, *, default: bool) -> Manifest:
    """Write a schedule into a bundle, with the JSON text of how it was found.

    The report is a new file, ``schedules/NAME-HASH.json``, and the network of a learned schedule another,
    ``schedules/NAME-HASH.onnx``; then `bundle.json` is replaced, which names them; then such files that it does not
    name go: what the schedule had before, and what a killed process left. Killed between two of these, the bundle is
    the old or the new one. Only one process at a time writes (on Windows nothing sees to that).

    Args:
        bundle: an open bundle.
        name: of the schedule; one that exists is replaced.
        schedule: its text, or the ONNX file of a learned one.
        report: what is known of it.
        default: whether it becomes the bundle's default schedule.

    Returns: the new manifest.

    Raises:
        PmpdError: the name does not fit, or the bundle cannot be written.
    """
    check_name(bundle.manifest, name)
    if (bundle.path / FOLDER).is_symlink():
        raise PmpdError(f"{bundle.path / FOLDER} is a link: nothing is written outside a bundle, remove it")
    with _alone(bundle.path):
        # What is on disk may be newer than what was opened: another schedule was found meanwhile.
        manifest = Manifest.from_json((bundle.path / MANIFEST_NAME).read_text(encoding="utf-8"))
        (bundle.path / FOLDER).mkdir(exist_ok=True)
        new = [_write(bundle, name, "json", report.encode())]
        if isinstance(schedule, bytes):
            new.append(_write(bundle, name, "onnx", schedule))
            schedule = f"learned:{new[-1][0]}"
        schedules = {**manifest.schedules, name: schedule}
        old = re.compile(rf"{FOLDER}/{re.escape(name)}-[0-9a-f]{{8}}\.\w+")
        kept = {
            file: entry
            for file, entry in manifest.files.items()
            if not old.fullmatch(file) or any(file in text for text in schedules.values())
        }
        manifest = replace(
            manifest,
            files={**kept, **dict(new)},
            schedules=schedules,
            default_schedule=name if default else manifest.default_schedule,
        )
        write_atomically(bundle.path / MANIFEST_NAME, manifest.to_json())
        _remove_unlisted(bundle.path, manifest)
    return manifest


def _write(bundle: Bundle, name: str, kind: str, data: bytes) -> tuple[str, FileEntry]:
    """Write a file of a schedule; return its name in the bundle and its entry."""
    digest = hashlib.sha256(data).hexdigest()
    file = f"{FOLDER}/{name}-{digest[:8]}.{kind}"
    write_atomically(bundle.path / file, data)
    return file, FileEntry(size=len(data), sha256=digest)


def _remove_unlisted(bundle: Path, manifest: Manifest) -> None:
    """Remove files of schedules, and drafts, that a manifest does not list."""
    for folder, pattern in ((bundle / FOLDER, WRITTEN), (bundle, DRAFT)):
        for path in folder.iterdir():
            if pattern.fullmatch(path.name) and path.relative_to(bundle).as_posix() not in manifest.files:
                path.unlink(missing_ok=True)


if sys.platform == "win32":

    @contextmanager
    def _alone(bundle: Path) -> Iterator[None]:
        yield

else:
    import fcntl

    @contextmanager
    def _alone(bundle: Path) -> Iterator[None]:
        """Wait until no other process writes into a bundle, and keep others waiting meanwhile."""
        descriptor = os.open(bundle, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
