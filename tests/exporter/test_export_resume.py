"""An export that is stopped at any moment leaves no broken bundle, and the next one goes on from there."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_with_tokenizer

from pmpd.exporter import ExportConfig, export_bundle, outline, pipeline
from pmpd.exporter.bundle.workspace import Workspace
from pmpd.exporter.calibrate import fisher
from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.quantize import NestedCodes
from pmpd.runtime import Bundle
from pmpd.runtime.errors import PmpdError

SMALL: dict[str, Any] = {"precisions": (2,), "head_precision": 2, "calibration": "none", "targets": ()}
LAYERS = 4 * 2 + 2  # of the tiny model: what is quantized, the embedding too


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The owl saw a tree and a ball. " * 20)
    return file


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> ExportConfig:
    """An export that takes about a second."""
    return ExportConfig(
        model=str(tiny), output=tmp_path / "bundle", precisions=(2,), head_precision=2, calibration="none", targets=()
    )


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of `small` when nothing stops it."""
    output = tmp_path_factory.mktemp("undisturbed") / "bundle"
    export_bundle(
        ExportConfig(model=str(tiny), output=output, precisions=(2,), head_precision=2, calibration="none", targets=())
    )
    return (output / "weights.bin").read_bytes()


@contextmanager
def interrupted(owner: Any, name: str, *, after: int = 0) -> Iterator[None]:
    """Interrupt what runs inside when a function of `owner` has been called `after` times and is called again."""
    function = getattr(owner, name)
    left = after

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            yield


def quantized_layers(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """Return how many layers are quantized while `run` runs."""
    count = 0
    stack = NestedCodes.stack  # once for each layer, when all of its parts are quantized

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return stack(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(NestedCodes, "stack", counting)
        run()
    return count


def partial(config: ExportConfig) -> Path:
    """Return the folder of the only unfinished export to the output."""
    (folder,) = unfinished(config.output)
    return folder


def unfinished(output: Path) -> list[Path]:
    """Return the folders of all unfinished exports to an output."""
    return [path for path in output.with_name(f"{output.name}.partial").iterdir() if path.is_dir()]


def assert_published(config: ExportConfig, weights: bytes) -> None:
    """The bundle is whole, has these weights, and stands alone."""
    Bundle.open(config.output, verify=True)
    assert (config.output / "weights.bin").read_bytes() == weights
    assert [path.name for path in config.output.parent.iterdir()] == [config.output.name]
    assert not any("journal" in file.name or "lock" in file.name for file in config.output.iterdir())


@pytest.mark.parametrize(
    ("owner", "name", "after", "left"),
    [
        (Workspace, "write", 0, LAYERS),
        (Workspace, "write", 1, LAYERS),
        (Workspace, "write", 4, LAYERS - 3),
        (os, "fsync", 4, LAYERS - 1),  # the bytes of the second layer are written and not on record
        (NestedCodes, "stack", LAYERS - 1, 1),
        (outline, "build_graph", 0, 0),
        (pipeline, "Verification", 0, 0),
        (pipeline, "model_card", 0, 0),
        (Workspace, "publish", 0, 0),
        (Path, "rename", 0, 0),
    ],
)
def test_a_stopped_export_resumes(
    owner: Any,
    name: str,
    after: int,
    left: int,
    small: ExportConfig,
    undisturbed: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with interrupted(owner, name, after=after):
        export_bundle(small)
    assert not small.output.exists()
    assert quantized_layers(monkeypatch, lambda: export_bundle(small)) == left
    assert_published(small, undisturbed)


def test_a_line_cut_short_in_the_journal_does_not_count(
    small: ExportConfig, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted(Workspace, "write", after=2):
        export_bundle(small)
    with (partial(small) / "journal").open("a") as journal:
        journal.write("head_proj")
    assert quantized_layers(monkeypatch, lambda: export_bundle(small)) == LAYERS - 1
    assert_published(small, undisturbed)


@pytest.mark.parametrize("name", ["bundle/weights.bin", "journal"])
def test_damaged_work_is_done_again(
    name: str, small: ExportConfig, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted(Workspace, "write", after=4):
        export_bundle(small)
    os.truncate(partial(small) / name, 0)
    assert quantized_layers(monkeypatch, lambda: export_bundle(small)) == LAYERS
    assert_published(small, undisturbed)


def other_norm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        (lambda c: replace(c, precisions=(2, 1)), False),
        (lambda c: replace(c, parent=3), False),
        (lambda c: replace(c, groups=2), False),
        (lambda c: replace(c, seed_precision=1), False),
        (lambda c: replace(c, head_precision=3), False),
        (lambda c: replace(c, context_length=32), False),
        (lambda c: replace(c, calibration_samples=3), False),
        (lambda c: c.calibration.write_text("Another text. " * 99) and c, False),
        (lambda c: other_norm(Path(c.model)) or c, False),
        (lambda c: os.utime(Path(c.model) / "model.safetensors") or c, False),
        (lambda c: replace(c, schedule="uniform:2", parent=2, prefill=2), True),
        (lambda c: replace(c, overwrite=True), True),
    ],
    ids=[
        *("precisions", "parent", "groups", "seed", "head", "context", "calibration samples", "calibration text"),
        *("config.json", "weights", "nothing", "overwrite"),
    ],
)
def test_old_work_serves_the_same_export_only(
    change: Callable[[ExportConfig], ExportConfig], reused: bool, tiny: Path, text: Path, tmp_path: Path
) -> None:
    model, calibration = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny, model)
    shutil.copy(text, calibration)
    config = ExportConfig(
        model=str(model),
        output=tmp_path / "out" / "bundle",
        precisions=(2,),
        head_precision=2,
        calibration=calibration,
        targets=(),
    )
    with interrupted(pipeline, "collect_statistics"):
        export_bundle(config)
    with interrupted(pipeline, "collect_statistics"):
        export_bundle(change(config))
    assert len(unfinished(config.output)) == (1 if reused else 2)


def test_an_export_keeps_another_one_out_of_its_folder(small: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    verification = pipeline.Verification

    def export_again(*arguments: Any) -> Any:
        with pytest.raises(PmpdError, match=r"another export is writing .*/bundle: wait for it or end it"):
            export_bundle(small)
        return verification(*arguments)

    monkeypatch.setattr(pipeline, "Verification", export_again)
    export_bundle(small)
    Bundle.open(small.output, verify=True)


def test_calibration_changes_the_codes_and_is_not_done_twice(
    small: ExportConfig,
    text: Path,
    undisturbed: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    calibrated = replace(small, calibration=text, calibration_samples=2, calibration_length=16)
    export_bundle(calibrated)
    weights = (small.output / "weights.bin").read_bytes()
    assert len(weights) == len(undisturbed)
    assert weights != undisturbed
    shutil.rmtree(small.output)
    with interrupted(Workspace, "write", after=3):
        export_bundle(calibrated)
    monkeypatch.setattr(fisher, "squared_gradients", None)
    export_bundle(calibrated)
    assert_published(small, weights)


@pytest.mark.parametrize(("ids", "samples", "length", "wanted"), [(10, 3, 4, 2), (10, 2, 4, 2), (8, 64, 8, 1)])
def test_calibration_sequences_are_pieces_of_the_text(ids: int, samples: int, length: int, wanted: int) -> None:
    batches = calibration_batches(list(range(ids)), samples, length)
    assert len(batches) == wanted
    for batch in batches:
        assert batch.tolist() == [list(range(int(batch[0, 0]), int(batch[0, 0]) + length))]
    assert [batches[0][0, 0], batches[-1][0, -1]] == [0, ids - 1] if wanted > 1 else [0, length - 1]


@pytest.mark.full
@pytest.mark.interruptible
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "bundle"
    command = [
        sys.executable,
        "-c",
        "from pmpd.exporter.cli import main; main()",
        "-q",
        "-m",
        "demo",
        "-o",
        str(output),
        "--target",
        "none",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (work := list(tmp_path.glob("*.partial/*/journal"))) or not work[0].read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    message = "error: interrupted: run the same command again to resume\n"
    assert (process.returncode, out, err) == (128 + number, "", message)
    assert not output.exists()


@pytest.mark.parametrize(
    ("size", "count"),
    [("tiny", 3), *(pytest.param(size, 10, marks=pytest.mark.slow) for size in ("tiny", "demo"))],
)
def test_killing_an_export_at_any_moment_leaves_no_broken_bundle(
    size: str, count: int, tiny: Path, tmp_path: Path
) -> None:
    # Processes forked from one that has imported everything spend their time exporting, so that is where kills land.
    context = multiprocessing.get_context("forkserver")
    lazy = [f"transformers.models.{name}" for name in ("auto.tokenization_auto", "llama.modeling_llama")]
    context.set_forkserver_preload(["pmpd.exporter.pipeline", *lazy])
    config = ExportConfig(
        model=str(tiny) if size == "tiny" else "demo", output=tmp_path / "bundle", calibration="none", targets=()
    )

    def run(seconds: float | None) -> bool:
        """Export for so long; return whether it was killed."""
        process = context.Process(target=export_bundle, args=(config,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0
        if config.output.exists():
            Bundle.open(config.output, verify=True)
        else:
            assert killed
        return killed

    run(0.0)  # starts the process that the others are forked from
    begin = time.monotonic()
    run(None)
    duration = time.monotonic() - begin
    weights = (config.output / "weights.bin").read_bytes()
    choose = random.Random(count).uniform
    kills = 0
    while kills < count:
        if config.output.exists():
            shutil.rmtree(config.output)
        kills += run(choose(0, duration))
    if not config.output.exists():
        run(None)
    assert_published(config, weights)
