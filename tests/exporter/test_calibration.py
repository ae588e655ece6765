"""Statistics of calibration text: computed once per model and text, kept on disk, read layer by layer by a method."""

from __future__ import annotations

import logging
import os
import shutil
import tracemalloc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import save_with_tokenizer

from pmpd.exporter import Export, ExportConfig, export_bundle
from pmpd.exporter.calibrate import STATISTICS, fisher
from pmpd.exporter.calibrate.store import StatisticsStore, cache_folder
from pmpd.exporter.quantize import METHODS, AnyPrecision, Method, NestedCodes
from pmpd.runtime import Bundle
from pmpd.runtime.errors import PmpdError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of statistics in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pmpd" / "statistics"


@pytest.fixture
def calibrated(tiny: Path, tmp_path: Path, cache: Path) -> ExportConfig:
    text = tmp_path / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 20)
    return ExportConfig(
        model=str(tiny),
        output=tmp_path / "bundle",
        method="anyprecision",
        precisions=(2,),
        targets=(),
        calibration=text,
        calibration_samples=2,
        calibration_length=16,
        verify=False,  # of what others test
    )


def test_statistics_are_computed_once_for_all_exports_of_a_model_and_a_text(
    calibrated: ExportConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    export_bundle(calibrated)
    (folder,) = cache.iterdir()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="pmpd"):
        patch.setattr(fisher, "squared_gradients", None)
        export_bundle(replace(calibrated, output=tmp_path / "other", precisions=(3,), head_precision=4))
    assert f"calibrate  fisher statistics of an earlier export: {folder}" in caplog.text
    weights = [
        name
        for layer in Export.prepare(replace(calibrated, output=tmp_path / "x")).plan.linears
        for name in layer.weight_names
    ]
    assert {file.name for file in folder.iterdir()} == {f"{name}.npy" for name in weights}


@pytest.mark.parametrize("change", ["text", "samples", "length", "model"])
def test_statistics_of_another_model_or_text_are_not_used(
    change: str, calibrated: ExportConfig, cache: Path, tmp_path: Path
) -> None:
    Export.prepare(calibrated).statistics()
    other = replace(calibrated, output=tmp_path / "other")
    assert calibrated.calibration is not None
    if change == "text":
        calibrated.calibration.write_text("Another story about a cat. " * 30)
    elif change == "model":
        shutil.copytree(calibrated.model, tmp_path / "model")
        os.utime(tmp_path / "model" / "model.safetensors")
        other = replace(other, model=str(tmp_path / "model"))
    else:
        other = replace(other, **{f"calibration_{change}": 3})
    Export.prepare(other).statistics()
    assert len(list(cache.iterdir())) == 2


def test_statistics_that_were_cut_short_are_computed_again(
    calibrated: ExportConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = np.save, 0

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(calibrated)
    assert [path.suffix for path in cache.iterdir()] == [".partial"]
    export_bundle(calibrated)
    (folder,) = cache.iterdir()
    assert folder.name.startswith("fisher-")
    assert all(file.suffix == ".npy" for file in folder.iterdir())


def test_damaged_statistics_are_one_line(calibrated: ExportConfig, cache: Path) -> None:
    export_bundle(calibrated)
    shutil.rmtree(calibrated.output)
    (folder,) = cache.iterdir()
    for file in folder.iterdir():
        os.truncate(file, 0)
    with pytest.raises(PmpdError, match=r"is damaged \(.*\): delete it and export again") as caught:
        export_bundle(calibrated)
    assert "\n" not in str(caught.value)


def test_a_cache_without_room_is_noticed_before_the_model_is_loaded(
    calibrated: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=99 if Path(folder) == cache_folder() else 1 << 30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(fisher, "squared_gradients", None)
    with pytest.raises(PmpdError, match=r"statistics has 99 bytes free, calibration takes .* XDG_CACHE_HOME"):
        export_bundle(calibrated)


def test_a_cache_that_cannot_be_written_is_one_line(calibrated: ExportConfig, cache: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("in the way")
    with pytest.raises(PmpdError, match=r"cannot keep statistics in .* set XDG_CACHE_HOME to another folder"):
        export_bundle(calibrated)


def test_one_layer_of_statistics_is_in_memory_at_a_time(cache: Path) -> None:
    N, K, layers = 256, 1024, 16  # 1 MB a layer
    names = [f"layers.{i}.weight" for i in range(layers)]
    model = torch.nn.Linear(1, 1)

    class Ones:
        name: ClassVar[str] = "fisher"

        def nbytes(self, weight: str, rows: int, columns: int) -> int:
            return 4 * rows * columns

        def compute(self, _: Any, __: Any, weights: Collection[str], write: Callable[..., None], *___: Any) -> None:
            for weight in weights:
                write(weight, np.ones((N, K), dtype=np.float32))

        def select(self, _: Any, __: int, array: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
            return {"fisher": np.array(array)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STATISTICS, "fisher", Ones())
        tracemalloc.start()
        try:
            shapes = dict.fromkeys(names, (N, K))
            store = StatisticsStore.collect(["fisher"], key="k", shapes=shapes, load=lambda: (model, []))
            for name in names:
                layer: Any = SimpleNamespace(weight_names=(name,))
                assert store.of(layer, 0)["fisher"].shape == (N, K)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3 * 4 * N * K


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A toy method: the sign of each weight, and the mean magnitude of its row; one bit, needs a toy statistic."""

    name: ClassVar[str] = "sign"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    requires: ClassVar[frozenset[str]] = frozenset({"tokens"})
    seen: ClassVar[list[float]] = []

    precisions: tuple[int, ...]
    parent: int
    seed: int
    groups: int

    def quantize(
        self, weight: npt.NDArray[np.floating], statistics: Mapping[str, npt.NDArray[np.floating]]
    ) -> NestedCodes:
        self.seen.append(float(statistics["tokens"]))
        codes = np.where(weight >= 0, 2**self.parent - 1, 0).astype(np.uint8)  # [N, K]
        size = np.abs(weight).mean(axis=1)  # [N]
        books = {}
        for p in self.precisions:
            book = np.zeros((len(weight), self.groups, 2**p), dtype=np.float16)  # [N, G, 2**p]
            book[:, :, 0], book[:, :, -1] = -size[:, None], size[:, None]
            books[p] = book
        return NestedCodes(codes, books)


class Tokens:
    """A toy statistic: how many tokens the model has seen."""

    name: ClassVar[str] = "tokens"

    def compute(
        self,
        model: torch.nn.Module,
        batches: Sequence[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.generic]], None],
        progress: Callable[..., Iterable[torch.Tensor]],
    ) -> None:
        count = sum(batch.numel() for batch in progress(batches, len(batches)))
        for name in weights:
            write(name, np.array(count, dtype=np.float32))

    def nbytes(self, weight: str, rows: int, columns: int) -> int:
        return 4

    def select(self, layer: Any, part: int, array: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.float32]]:
        return {"tokens": np.array(array, dtype=np.float32)}


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """What README says a new method takes: a class, and its name in the registry. The same for a statistic."""
    method: type[Method] = Sign
    monkeypatch.setitem(METHODS, "sign", method)
    monkeypatch.setitem(STATISTICS, "tokens", Tokens())
    monkeypatch.setattr(Sign, "seen", [])
    return method


def test_a_registered_method_gets_the_statistics_it_needs(
    sign: type[Method], calibrated: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, quantize = [], AnyPrecision.quantize

    def noted(self: AnyPrecision, weight: Any, statistics: Any) -> Any:
        others.append((weight.shape, statistics))
        return quantize(self, weight, statistics)

    monkeypatch.setattr(AnyPrecision, "quantize", noted)
    manifest = export_bundle(replace(calibrated, method="sign", precisions=(1,), head_precision=1, seed_precision=1))
    assert manifest.configuration["method"] == "sign"
    assert set(Sign.seen) == {2 * 16}
    shape = manifest.architecture
    assert others == [((shape.vocab_size, shape.hidden_size), {})]  # the embedding, which no statistics are of
    Bundle.open(calibrated.output, verify=True)


def test_a_method_and_the_calibration_must_fit(sign: type[Method], calibrated: ExportConfig, monkeypatch: Any) -> None:
    with pytest.raises(PmpdError, match="method sign needs a calibration text: leave out --calibration none"):
        replace(calibrated, method="sign", calibration="none")
    monkeypatch.setattr(Sign, "requires", frozenset())
    monkeypatch.setattr(Sign, "needs", frozenset())
    with pytest.raises(PmpdError, match="method sign uses no calibration text: leave out --calibration"):
        replace(calibrated, method="sign")
    with pytest.raises(PmpdError, match="unknown method 'awq': choose one of"):
        replace(calibrated, method="awq")


def test_every_method_needs_statistics_that_there_are() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.requires <= method.needs <= STATISTICS.keys()
