"""What is kept in this folder still comes out: the demo model's texts, and the tokens of bundles made in the past."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmpd.runtime import Bundle, Generator, Tokenizer

FOLDER = Path(__file__).parent
TEXTS: dict[str, Any] = json.loads((FOLDER / "demo-texts.json").read_text(encoding="utf-8"))
SCHEDULES = sorted(set(TEXTS["texts"]) - {"unquantized"})
BUNDLES = sorted(path.name.removesuffix(".tokens.json") for path in FOLDER.glob("*.tokens.json"))
Once = Callable[[str, Callable[[Path], object]], Path]


def text_of(generator: Generator, schedule: str) -> str:
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode(TEXTS["prompt"])
    tokens = generator.stream(ids, max_new_tokens=40, schedule=schedule)
    return "".join(token.text or "" for token in tokens)


def open_generator(bundle: Bundle, **options: Any) -> Generator:
    return Generator(bundle, tokenizer=Tokenizer.from_bundle(bundle), **options)


@pytest.fixture(scope="module")
def portable(demo_bundle: Path) -> Generator:
    return open_generator(Bundle.open(demo_bundle), kernels=False)


@pytest.fixture(scope="module")
def exact(demo_bundle: Path, once: Once) -> Generator:
    """The same bundle with exact kernels of this machine."""
    pytest.importorskip("tvm")
    pytest.importorskip("ziglang")
    from pmpd.tvm_kernels import build_library
    from pmpd.tvm_kernels.targets import host_target

    name = host_target()
    if name is None:
        pytest.skip("no operator library is made for this machine")
    bundle = Bundle.open(demo_bundle)

    def build(folder: Path) -> None:
        output, head_dim = folder / "libpmpd_ops.so", bundle.manifest.architecture.head_dim
        precisions = sorted({*bundle.manifest.precisions, 6})
        build_library(name, precisions=precisions, head_dims=(head_dim,), output=output)

    library = once("demo-kernels", build) / "libpmpd_ops.so"
    return open_generator(bundle, kernels=library, accuracy="exact", require_fast_kernels=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_portable_graphs_write_the_golden_text(portable: Generator, schedule: str) -> None:
    assert text_of(portable, schedule) == TEXTS["texts"][schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exact_kernels_write_the_golden_text(exact: Generator, schedule: str) -> None:
    assert text_of(exact, schedule) == TEXTS["texts"][schedule]


@pytest.fixture(scope="module", params=BUNDLES)
def recorded(request: pytest.FixtureRequest) -> tuple[Generator, dict[str, Any]]:
    """A bundle of this folder, and the tokens it gave when it was made."""
    record = json.loads((FOLDER / f"{request.param}.tokens.json").read_text(encoding="utf-8"))
    return Generator(Bundle.open(FOLDER / request.param, verify=True), kernels=False), record


def test_bundles_give_the_tokens_of_their_time(recorded: tuple[Generator, dict[str, Any]]) -> None:
    generator, record = recorded
    for name, wanted in record["tokens"].items():
        schedule = None if name == "None" else name
        tokens = generator.stream(record["prompt"], max_new_tokens=len(wanted), schedule=schedule)
        assert [token.id for token in tokens] == wanted


def test_bundles_give_the_logits_of_their_time(recorded: tuple[Generator, dict[str, Any]]) -> None:
    generator, record = recorded
    generator.reset()
    np.testing.assert_allclose(generator.prefill(record["prompt"]), record["logits_of_prompt"], atol=2e-3)
