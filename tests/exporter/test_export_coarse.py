"""Exports whose output layer is computed coarse to fine: what is in the bundle, and that the runtime reads less."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from test_export_kernels import HOST, plain_library
from tiny_models import GEMMA_IDS, TinyModel, random_ids

from pmpd.eval.speed.coarse import bytes_read, compare
from pmpd.eval.speed.traffic import step_bytes
from pmpd.exporter import ExportConfig, Skeleton, export_bundle, pipeline
from pmpd.exporter.bundle import coarse, kernels
from pmpd.exporter.cli import main
from pmpd.exporter.outline import Outline, coarse_bits
from pmpd.runtime import Bundle, Engine, Generator, PmpdError, Sampling
from pmpd.runtime import Sequence as Conversation
from pmpd.runtime.engine.kernels import LOGITS
from pmpd.tvm_kernels.library import link as link_module
from pmpd.tvm_kernels.library.compile import Progress

pytestmark = pytest.mark.skipif(not HOST, reason="no operator library is made for this machine")
WORDS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModel("llama", {"vocab_size": WORDS}).save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of plain C kernels."""
    return plain_library(tmp_path_factory.mktemp("library") / "right.so")


@pytest.fixture
def library(plain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library, which exports take for compiled kernels."""
    use_library(plain, monkeypatch)
    return plain


def use_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(
        target: str, *, precisions: Sequence[int], head_dims: Sequence[int], output: Path, progress: Progress
    ) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, output)

    monkeypatch.setattr(kernels, "build_library", build)
    monkeypatch.setattr(pipeline, "require_toolchain", lambda _target: None)


def config(model: Path, output: Path, **options: Any) -> ExportConfig:
    defaults = {"precisions": (4,), "head_precision": 6, "coarse_precision": 3, "targets": (HOST,)}
    return ExportConfig(model=str(model), output=output, **{**defaults, **options})


@pytest.fixture(scope="module")
def bundle(model: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("bundle") / "out"
    with pytest.MonkeyPatch.context() as patch:
        use_library(plain, patch)
        export_bundle(config(model, output))
    return Bundle.open(output)


def test_a_verified_bundle_finishes_few_logits_and_gives_the_same_texts(bundle: Bundle) -> None:
    names = [name for name in bundle.manifest.verification if name.startswith("coarse logits")]
    assert len(names) == 2  # of exact and of int8 kernels
    assert {tensor.name for tensor in bundle.manifest.tensors if tensor.layer == "head_proj"} == {
        f"head_proj.{name}" for name in ("planes", "codebook.6", "codebook.3", "basis", "bound")
    }
    engine = Engine(bundle)
    prompts = [random_ids(WORDS, 5), random_ids(WORDS, 9)[4:]]
    result = compare(engine, prompts, tokens=20, precision=4, margins=[0, 1000])
    assert (result.same_texts, result.same_tokens) == (2, 40)
    assert 0 < result.finished < 0.5
    assert result.bytes_read < 1
    assert result.variation["1000"] == (0, 0, 1)
    assert 0 < result.variation["0"][0] < 1


def test_logits_with_a_softcap_keep_their_order(library: Path, tmp_path: Path) -> None:
    capped = TinyModel("gemma2", {"vocab_size": WORDS, "final_logit_softcapping": 2.0, "head_dim": 16, **GEMMA_IDS})
    export_bundle(config(capped.save(tmp_path / "capped"), tmp_path / "out"))
    engine = Engine(Bundle.open(tmp_path / "out"))
    result = compare(engine, [random_ids(WORDS, 5), random_ids(WORDS, 9)[4:]], tokens=20, precision=4)
    assert (result.same_texts, result.same_tokens) == (2, 40)
    assert 0 < result.finished < 0.7
    assert np.abs(Conversation(engine, context_length=8).step(7, precision=4)).max() < 2


def test_logits_are_whole_unless_a_margin_is_asked_for(bundle: Bundle) -> None:
    engine = Engine(bundle)
    conversation = Conversation(engine, context_length=32)
    together = conversation.decode(random_ids(WORDS, 6), precision=4)
    conversation.reset()
    steps = np.stack([conversation.step(i, precision=4).copy() for i in random_ids(WORDS, 6)])
    np.testing.assert_allclose(steps, together, atol=1e-4)
    assert finished(engine) == 1
    conversation.reset()
    engine.kernels(reset=True)
    coarse_steps = np.stack([conversation.step(i, precision=4, margin=0).copy() for i in random_ids(WORDS, 6)])
    assert finished(engine) < 0.5
    assert not np.array_equal(coarse_steps, steps)
    np.testing.assert_array_equal(coarse_steps.argmax(axis=1), steps.argmax(axis=1))


@pytest.mark.parametrize(
    ("sampling", "whole"),
    [
        (Sampling(), False),
        (Sampling(temperature=0.1, seed=1), False),
        (Sampling(repetition_penalty=1.2), True),
    ],
)
def test_what_a_generator_needs_of_the_logits(bundle: Bundle, sampling: Sampling, whole: bool) -> None:
    with Generator(bundle) as generator:
        generator.generate(random_ids(WORDS, 4), max_new_tokens=8, sampling=sampling, stop_ids=())
        assert (finished(generator.engine) == 1) == whole


def test_without_kernels_the_definition_runs(bundle: Bundle) -> None:
    whole, coarse_logits = (
        Conversation(Engine(bundle, kernels=False), context_length=8).step(7, precision=4, margin=margin).copy()
        for margin in (np.inf, 0.0)
    )
    np.testing.assert_array_equal(whole, coarse_logits)


def finished(engine: Engine) -> float:
    [share] = [node.finished for node in engine.kernels() if node.op == LOGITS and node.finished is not None]
    return share


def test_a_wrong_bound_fails_the_export(
    model: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = coarse.bounds

    def wrong(*arguments: Any) -> npt.NDArray[np.float16]:
        return (right(*arguments) * np.float16(0.1)).astype(np.float16)

    monkeypatch.setattr(coarse, "bounds", wrong)
    with pytest.raises(PmpdError, match=r"verification failed, coarse logits of exact .* kernels at 4 bits"):
        export_bundle(config(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_kernel_that_forgets_rows_fails_the_export(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(link_module.SOURCES, tmp_path / "ort_ops")
    source = tmp_path / "ort_ops" / "logits.c"
    text = source.read_text(encoding="utf-8")
    line = "if (matters && first < 0) first = tile;"
    assert text.count(line) == 1
    source.write_text(text.replace(line, "if (matters && first < 0 && tile % 8) first = tile;"), encoding="utf-8")
    monkeypatch.setattr(link_module, "SOURCES", tmp_path / "ort_ops")
    use_library(plain_library(tmp_path / "wrong.so"), monkeypatch)
    with pytest.raises(PmpdError, match=r"verification failed, coarse logits of exact"):
        export_bundle(config(model, tmp_path / "out"))


@pytest.mark.parametrize(
    ("alias", "options", "bits"),
    [
        ("demo", {}, None),
        ("phi-2", {}, 4),
        ("phi-2", {"coarse_precision": 0}, None),
        ("phi-2", {"coarse_precision": 3}, 3),
        ("phi-2", {"head_precision": 5}, None),
        ("phi-2", {"groups": 2}, None),
    ],
)
def test_large_vocabularies_are_read_coarse_to_fine(alias: str, options: dict[str, Any], bits: int | None) -> None:
    skeleton = Skeleton.of(ExportConfig(model=alias, output=Path(), **options))
    outline: Outline = skeleton.outline
    assert coarse_bits(outline.config, outline.family) == bits
    ops = [{node.op_type for node in skeleton.model(graph).graph} for graph in skeleton.graphs[:2]]
    assert [LOGITS in names for names in ops] == [False, bits is not None]  # prefill, decode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coarse-precision", "6"], "coarse precision must be 0 (off) or 1 to 5 bits"),
        (["--coarse-precision", "-1"], "coarse precision must be 0 (off) or 1 to 5 bits"),
        (["--coarse-precision", "4", "--groups", "2"], "it needs one codebook per row"),
    ],
)
def test_a_coarse_precision_that_cannot_be(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["-m", "demo", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_bytes_that_a_step_reads(bundle: Bundle, model: Path, library: Path, tmp_path: Path) -> None:
    whole = 600 * (6 * 64 + 64 * 2)
    always = 600 * (3 * 64 + 8 * 2 + 5 * 2)
    assert bytes_read(bundle.manifest, 0.25) == pytest.approx(always / whole + 0.25)
    step = step_bytes(bundle.manifest, precision=4, positions=0)
    export_bundle(config(model, tmp_path / "plain", coarse_precision=0, verify=False))
    without = Bundle.open(tmp_path / "plain").manifest
    with pytest.raises(PmpdError, match="no coarse output layer"):
        bytes_read(without, 0)
    basis = next(tensor for tensor in bundle.manifest.tensors if tensor.role == "basis")
    assert step == step_bytes(without, precision=4, positions=0) - whole + always + basis.length
