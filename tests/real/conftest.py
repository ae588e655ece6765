"""Real models and data: those beside the project in ../shared, and checkpoints in this user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pmpd-models"
Once = Callable[[str, Callable[[Path], object]], Path]


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} in ../shared, which is not there")
    return path


def fetched(name: str) -> Path:
    path = CACHE / name
    if not (path / "model.safetensors").exists():
        pytest.skip(f"needs {path}: run `../shared/models/real/fetch.py {name}`")
    return path


@pytest.fixture(scope="session")
def dialog_model() -> Path:
    """A summarizer of dialogues of 7.2 M parameters."""
    return shared("models", "dialog", "model.safetensors").parent


@pytest.fixture(scope="session")
def dialogues() -> Path:
    """The test set of DialogSum."""
    return shared("data", "dialogsum", "dialogsum.test.jsonl")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Two raw texts of WikiText-2: `wiki.valid.raw` and `wiki.test.raw`."""
    return shared("data", "wikitext2")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint of SmolLM2-135M-Instruct."""
    return fetched("smollm2-135m")


@pytest.fixture(scope="session")
def qwen2() -> Path:
    """The checkpoint of Qwen2.5-Coder-0.5B-Instruct."""
    return fetched("qwen2.5-0.5b")


@pytest.fixture(scope="session")
def dialog_bundle(dialog_model: Path, once: Once) -> Path:
    """The summarizer at 4, 3 and 2 bits, with kernels where they can be made here."""
    return once("dialog", lambda folder: export(dialog_model, folder)) / "bundle"


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Path, once: Once) -> Path:
    """SmolLM2 at 4, 3 and 2 bits, verified, with kernels where they can be made here."""
    return once("smollm2", lambda folder: export(smollm2, folder)) / "bundle"


def export(model: Path, folder: Path) -> None:
    from pmpd.exporter import ExportConfig, export_bundle

    export_bundle(ExportConfig(model=str(model), output=folder / "bundle", precisions=(4, 3, 2), calibration="none"))
