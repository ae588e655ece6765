"""Opening a bundle: everything that it states is checked before it is used."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import BundleError, one_line
from pmpd.runtime.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest
from pmpd.runtime.format.tensor import Tensor
from pmpd.runtime.format.typed_json import parse_object

__all__ = ["Bundle", "read_file", "sha256_of"]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(root: Path, name: str, entry: FileEntry, *, hashed: bool) -> None:
    file = root / name
    if not file.is_file() or not file.resolve().is_relative_to(root.resolve()):
        raise BundleError(
            f"{file} is missing or a link to outside the bundle: copy it again, following links, or export again"
        )
    if file.stat().st_size != entry.size:
        raise BundleError(f"{file} has {file.stat().st_size} bytes instead of {entry.size}: copy the bundle again")
    if hashed and sha256_of(file) != entry.sha256:
        raise BundleError(f"{file} does not have the SHA-256 that bundle.json lists: copy the bundle again")


def read_file(file: Path, *, limit: int) -> bytes:
    """Return what a small file of a bundle holds.

    Raises:
        BundleError: it cannot be read, or has more than `limit` bytes.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)  # the size that a file claims may change, or be a terabyte of nothing
    except OSError as error:
        raise BundleError(f"{file} cannot be read ({error.strerror}): copy the bundle again") from None
    if len(data) > limit:
        raise BundleError(f"{file} is larger than {limit:,} bytes: do not use this bundle")
    return data


def _read_text(file: Path, *, limit: int) -> str:
    try:
        return str(read_file(file, limit=limit), "utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{file} is not UTF-8 text: the bundle is damaged, export again") from None


def _no_weights(root: Path) -> BundleError:
    return BundleError(
        f"{root} is a skeleton without weights: it can be studied, not run; export the model again without --skeleton"
    )


class Bundle:
    """An exported model on disk: its manifest, and one read-only mapping of its weights.

    Open one with `Bundle.open`. The mapping is made once and every session reads it, so weights are in memory once, and
    only those that have been read. Opening a bundle runs nothing that it holds; an `Engine` loads its kernel library.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._mappings: dict[str, npt.NDArray[np.uint8]] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False, skeleton: bool = False) -> Self:
        """Open the bundle in folder `path`.

        The manifest and the size of every file are always checked, and the SHA-256 of every file except weights.

        Args:
            path: the bundle's folder.
            verify: check the SHA-256 of weights too (about a second per gigabyte).
            skeleton: also accept a bundle without weights. Its manifest and graphs can be read; `tensor` raises.

        Raises:
            BundleError: the folder is not a bundle, or it is a skeleton and those are not accepted; a file is missing,
                truncated or altered; or the manifest is refused (see README.md of this folder).
        """
        root = Path(path)
        manifest_path = root / MANIFEST_NAME
        if not manifest_path.is_file():
            hint = (
                "an export is unfinished here, run it again"
                if any(part.endswith(".partial") for part in root.absolute().parts)
                else "give a bundle's folder"
            )
            raise BundleError(f"{root} has no {MANIFEST_NAME}: {hint} (pmpd-export makes one)")
        manifest = Manifest.from_json(_read_text(manifest_path, limit=MAX_MANIFEST_BYTES))
        if manifest.skeleton and not skeleton:
            raise _no_weights(root)
        for name, entry in manifest.files.items():
            try:
                _check_file(root, name, entry, hashed=verify or name not in manifest.weight_files)
            except OSError as error:
                raise BundleError(f"{root / name} cannot be read ({error.strerror}): copy the bundle again") from None
        bundle = cls(root, manifest)
        bundle.stop_ids  # noqa: B018 - a fault in its file is found now, not when text is generated
        return bundle

    def tensor(self, tensor: Tensor, *, planes: int | None = None) -> npt.NDArray[Any]:
        """Return a read-only view of a tensor in the mapped file; of a nested one, the first `planes` planes."""
        if self.manifest.skeleton:
            raise _no_weights(self.path)
        mapping = self._mappings.get(tensor.file)
        if mapping is None:
            mapping = self._mappings[tensor.file] = np.memmap(self.path / tensor.file, dtype=np.uint8, mode="r")
        array = mapping[tensor.offset : tensor.offset + tensor.length].view(tensor.dtype).reshape(tensor.shape)
        return array[:planes] if tensor.nested else array

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's `generation_config.json` (``eos_token_id`` and the like), empty when it has none.

        Raises:
            BundleError: it is not a JSON object in UTF-8.
        """
        file = self.path / "generation_config.json"
        if file.name not in self.manifest.files:
            return {}
        return parse_object(_read_text(file, limit=MAX_MANIFEST_BYTES), one_line(file))

    def why(self, schedule: str) -> str | None:
        """Return what a search said of the schedule that it found, in a sentence; None if there was no search.

        Raises:
            BundleError: its report is not a JSON object in UTF-8.
        """
        report = self.manifest.reports.get(schedule)
        if report is None:
            return None
        verdict = parse_object(_read_text(self.path / report, limit=MAX_MANIFEST_BYTES), report).get("verdict")
        return one_line(verdict, 300) if isinstance(verdict, str) else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a text, as ``eos_token_id`` states them: none, one or several.

        Raises:
            BundleError: it states something else.
        """
        stated = self.generation_config.get("eos_token_id")
        ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
        for token_id in ids:
            if type(token_id) is not int or token_id < 0:
                raise BundleError(
                    f"{self.path / 'generation_config.json'}: eos_token_id must be a token id or a list of them, "
                    f"got {stated!r:.60}: the bundle is damaged, export again"
                )
        return tuple(ids)
