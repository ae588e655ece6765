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
# Files that only `publish` writes: reports, and drafts of them and of the manifest (`write_atomically`).
REPORT = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}\.json|\.[A-Za-z0-9._-]+-[0-9a-f]{8}\.json\.\d+")
DRAFT = re.compile(rf"\.{re.escape(MANIFEST_NAME)}\.\d+")


def check_name(manifest: Manifest, name: str) -> None:
    """Raise PmpdError unless a bundle can have a schedule of this name."""
    try:
        replace(manifest, schedules={**manifest.schedules, name: "uniform:1"})
    except PmpdError:
        raise PmpdError(f"schedule name {name!r:.60}: use letters, digits, '.', '_' and '-'") from None


def publish(bundle: Bundle, name: str, schedule: str, report: str, *, default: bool) -> Manifest:
    """Write a schedule into a bundle, with the JSON text of how it was found.

    The report is a new file, ``schedules/NAME-HASH.json``; then `bundle.json` is replaced, which names it; then reports
    that it does not name go: what the schedule had before, and what a killed process left. Killed between two of them,
    the bundle is the old or the new one. Only one process at a time writes (on Windows nothing sees to that).

    Args:
        bundle: an open bundle.
        name: of the schedule; one that exists is replaced.
        schedule: its text.
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
        data = report.encode()
        digest = hashlib.sha256(data).hexdigest()
        file = f"{FOLDER}/{name}-{digest[:8]}.json"
        (bundle.path / FOLDER).mkdir(exist_ok=True)
        write_atomically(bundle.path / file, data)
        old = manifest.reports.get(name, file)
        files = {known: entry for known, entry in manifest.files.items() if known != old}
        manifest = replace(
            manifest,
            files={**files, file: FileEntry(size=len(data), sha256=digest)},
            schedules={**manifest.schedules, name: schedule},
            default_schedule=name if default else manifest.default_schedule,
        )
        write_atomically(bundle.path / MANIFEST_NAME, manifest.to_json())
        _remove_unlisted(bundle.path, manifest)
    return manifest


def _remove_unlisted(bundle: Path, manifest: Manifest) -> None:
    """Remove reports and drafts that a manifest does not list."""
    for folder, pattern in ((bundle / FOLDER, REPORT), (bundle, DRAFT)):
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
