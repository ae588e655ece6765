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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
        *,
        key: str,
        shapes: Mapping[str, tuple[int, int]],
        load: Callable[[], tuple[torch.nn.Module, Sequence[torch.Tensor]]],
    ) -> StatisticsStore:
        """Compute the statistics that are not in the cache yet, one after the other.

        Args:
            names: of `STATISTICS`.
            shapes: of the checkpoint's weights that will be quantized, by their names.
            key: fingerprint of the model, the text and the code.
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
                nbytes = sum(
                    STATISTICS[name].nbytes(weight, *shape) for name in missing for weight, shape in shapes.items()
                )
                _require_room(cache_folder(), nbytes)
                model, batches = load()
                for name, folder in missing.items():
                    with _new_folder(folder) as unfinished:
                        write, progress = partial(_write, unfinished), partial(_track, f"calibrate {name}")
                        STATISTICS[name].compute(model, batches, list(shapes), write, progress)
            except OSError as error:
                raise PmpdError(
                    f"cannot keep statistics in {cache_folder()} ({error.strerror}): make room, or set XDG_CACHE_HOME "
                    "to another folder, and run the same command to resume"
                ) from None
        return cls(folders)

    def of(self, layer: LinearLayer, part: int) -> dict[str, npt.NDArray[np.float32]]:
        """Read the statistics of one part of a layer, those that there are; nothing of any other is in memory.

        Raises:
            PmpdError: a file is damaged.
        """
        statistics: dict[str, npt.NDArray[np.float32]] = {}
        for name, folder in self._folders.items():
            try:
                array = np.load(folder / f"{layer.weight_names[part]}.npy", mmap_mode="r")
            except FileNotFoundError:
                continue
            except (OSError, ValueError, EOFError) as error:
                raise PmpdError(f"{folder} is damaged ({one_line(error)}): delete it and export again") from None
            statistics |= STATISTICS[name].select(layer, part, array)
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


def _track(step: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    return track(items, step=step, total=total)


def _write(folder: Path, name: str, array: npt.NDArray[np.generic]) -> None:
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
