"""Statistics on disk: computed once for a model and a text, and read layer by layer.

The folder of a statistic has one `.npy` file per weight. It is written under another name and renamed when it is
complete, so what has the right name can be trusted. It lives in the user's cache (``~/.cache/pmpd/statistics``) under
a fingerprint of all that it depends on: model, text, samples, length, and the code that computes it. So exports of one
model with other options, to other outputs, compute it once. Any folder there may be deleted at any time.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.bundle.lock import open_locked
from pmpd.exporter.calibrate import STATISTICS
from pmpd.runtime.console.output import byte_text
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError, one_line

__all__ = ["StatisticsStore", "cache_folder"]

log = logging.getLogger(__name__)
_LOCK = "lock"


def cache_folder() -> Path:
    """Return the folder of all statistics in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pmpd" / "statistics"


class StatisticsStore:
    """The statistics of one model on one text. Use `StatisticsStore.collect`."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders

    @classmethod
    def collect(
        cls,
        names: Collection[str],
        weights: Sequence[str],
        *,
        key: str,
        nbytes: int,
        load: Callable[[], tuple[torch.nn.Module, Sequence[torch.Tensor]]],
    ) -> StatisticsStore:
        """Compute the statistics that are not in the cache yet, one after the other.

        Args:
            names: of `STATISTICS`.
            weights: names of the checkpoint's weights that will be quantized.
            key: fingerprint of the model, the text and the code.
            nbytes: about the bytes that one statistic takes on disk.
            load: gives the model and the batches that `Statistic.compute` takes; called only if something is missing.

        Raises:
            PmpdError: the cache cannot be written, another export is computing the same, or as `Statistic.compute`.
        """
        folders = {name: cache_folder() / f"{name}-{key}" for name in sorted(names)}
        missing = {name: folder for name, folder in folders.items() if not folder.is_dir()}
        for name, folder in folders.items():
            if name not in missing:
                log.info("calibrate  %s statistics of an earlier export: %s", name, folder)
        if missing:
            try:
                _require_room(cache_folder(), nbytes * len(missing))
                model, batches = load()
                for name, folder in missing.items():
                    shown = track(batches, step=f"calibrate {name}", total=len(batches))
                    with _new_folder(folder) as unfinished:
                        STATISTICS[name].compute(model, shown, weights, partial(_write, unfinished))
            except OSError as error:
                raise PmpdError(
                    f"cannot keep statistics in {cache_folder()} ({error.strerror}): make room, or set XDG_CACHE_HOME "
                    "to another folder, and run the same command to resume"
                ) from None
        return cls(folders)

    def of(self, layer: LinearLayer) -> dict[str, npt.NDArray[np.float32]]:
        """Read and merge the statistics of one layer; nothing of any other layer is in memory.

        Raises:
            PmpdError: a file is missing or damaged.
        """
        statistics = {}
        for name, folder in self._folders.items():
            try:
                arrays = {weight: np.load(folder / f"{weight}.npy", mmap_mode="r") for weight in layer.weight_names}
            except (OSError, ValueError, EOFError) as error:
                raise PmpdError(f"{folder} is damaged ({one_line(error)}): delete it and export again") from None
            statistics[name] = STATISTICS[name].merge(layer, arrays)
        return statistics


def _require_room(folder: Path, nbytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise PmpdError(
            f"{folder} has {byte_text(free)} free, calibration takes {byte_text(nbytes)} there: make room, or set "
            "XDG_CACHE_HOME to another folder"
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` if the block succeeds; what a killed run left in it is deleted."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    unfinished.mkdir(exist_ok=True)
    try:
        lock = open_locked(unfinished / _LOCK)
    except (BlockingIOError, FileNotFoundError):
        raise PmpdError(f"another export is computing {folder.name}: wait for it, then run the same command") from None
    with lock:
        for file in unfinished.iterdir():
            if file.name != _LOCK:
                file.unlink()
        yield unfinished
        (unfinished / _LOCK).unlink()
        unfinished.rename(folder)


def _write(folder: Path, name: str, array: npt.NDArray[np.float32]) -> None:
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
