"""Codebooks learned end to end: gradients against plain autograd, models against plain ones, and whole exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY_MODELS, plain_model, save_with_tokenizer

from pmpd.exporter import Export, ExportConfig, export_bundle
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.bundle.workspace import Workspace
from pmpd.exporter.source.reference import load_model
from pmpd.exporter.tune import NEAR, Coded, Student, Tuner, rate
from pmpd.runtime import Bundle
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import dequantize, pack

Layers = dict[str, tuple[LinearLayer, Coded]]


def coded_layers(export: Export, bits: int) -> Layers:
    """Quantize a model, and return what its layers are at a precision."""
    layers = [layer for layer in export.plan.linears if layer.module.nested]
    quantized = {layer.name: (layer, export.quantized(layer, None)) for layer in layers}
    return {
        name: (layer, (nested.codes >> (layer.parent - bits), nested.codebooks[bits]))
        for name, (layer, nested) in quantized.items()
    }


def without_text(model: Path, **options: Any) -> Export:
    return Export.prepare(
        ExportConfig(model=str(model), output=model / "unused", calibration="none", targets=(), **options)
    )


@pytest.mark.parametrize(("name", "groups"), [*((name, 1) for name in TINY_MODELS), ("llama", 2), ("gemma2", 2)])
def test_a_student_is_the_model_with_other_weights(name: str, groups: int, tmp_path: Path) -> None:
    folder = TINY_MODELS[name].save(tmp_path / "model")
    export = without_text(folder, precisions=(4, 3), groups=groups)
    model, ids = plain_model(folder), torch.randint(0, export.outline.family.shape.vocab_size, (2, 9))
    student = Student(load_model(export.checkpoint, blocks_as_stored=True), torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(student.logits(student.hidden(ids)), model(ids).logits, rtol=1e-4, atol=1e-5)

    layers, state = coded_layers(export, 3), {}
    for layer, (codes, book) in layers.values():
        weight = dequantize(pack(codes, 3), book, layer.module.in_features)
        state |= {key: torch.from_numpy(array) for key, array in layer.unstack(weight).items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    student.load(layers)
    with torch.no_grad():
        np.testing.assert_allclose(student.logits(student.hidden(ids)), model(ids).logits, rtol=1e-4, atol=1e-5)
    before = {name: coded for name, (_, coded) in layers.items()}
    for name, book in student.codebooks(before).items():
        np.testing.assert_allclose(book, before[name][1], rtol=1e-3)  # where a multiplier is folded in


def test_gradients_of_codebooks_are_those_of_the_weights_added_up(tmp_path: Path) -> None:
    folder = TINY_MODELS["llama"].save(tmp_path / "model")
    export = without_text(folder, precisions=(3,))
    layers, ids = coded_layers(export, 3), torch.arange(12)[None]
    student = Student(load_model(export.checkpoint), torch.float32)
    student.load(layers)
    student.logits(student.hidden(ids)).square().sum().backward()

    model, weights = plain_model(folder), {}
    for layer, (codes, book) in layers.values():
        weight = dequantize(pack(codes, 3), book, layer.module.in_features)
        weights |= {key: torch.from_numpy(array) for key, array in layer.unstack(weight).items()}
    model.load_state_dict(weights, strict=False)
    model(ids).logits.square().sum().backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    found = iter(student.books)
    for layer, (codes, _) in layers.values():
        for part, name in enumerate(layer.weight_names):
            rows, _ = layer.places(part)
            by_code = [(gradients[name] * (codes[rows] == code)).sum(1) for code in range(8)]
            grad = next(found).grad
            assert grad is not None
            np.testing.assert_allclose(grad, np.stack(by_code, 1), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


def tuner(export: Export) -> Tuner:
    random = torch.Generator().manual_seed(0)
    vocabulary = export.outline.family.shape.vocab_size
    pieces = [torch.randint(0, vocabulary, (1, 24), generator=random) for _ in range(48)]
    return Tuner(load_model(export.checkpoint, blocks_as_stored=True), pieces, torch.float32)


def test_tuning_lowers_the_divergence_on_tokens_that_it_has_not_seen(tiny: Path) -> None:
    export = without_text(tiny, precisions=(4, 3, 2))
    by_tuner, layers = tuner(export), coded_layers(export, 2)
    tuned = by_tuner.tune(layers, rate=rate(2))
    assert tuned.after is not None
    assert tuned.after < 0.97 * tuned.before
    learned = {name: (layer, (codes, tuned.codebooks[name])) for name, (layer, (codes, _)) in layers.items()}
    assert by_tuner.tune(learned, rate=0).before == pytest.approx(tuned.after, rel=1e-5)


def test_tuning_that_goes_wrong_changes_nothing(tiny: Path) -> None:
    export = without_text(tiny, precisions=(4, 3, 2))
    layers = coded_layers(export, 2)
    tuned = tuner(export).tune(layers, rate=100)
    assert tuned.after is not None
    assert not tuned.after < tuned.before
    for name, (_, (_, book)) in layers.items():
        np.testing.assert_array_equal(tuned.codebooks[name], book)


def test_what_is_near_the_model_is_left_as_it_is(tiny: Path) -> None:
    export = without_text(tiny, precisions=(6, 2))
    layers = coded_layers(export, 6)
    tuned = tuner(export).tune(layers, rate=rate(6))
    assert tuned.before < NEAR
    assert tuned.after is None
    for name, (_, (_, book)) in layers.items():
        np.testing.assert_array_equal(tuned.codebooks[name], book)


def test_tuning_is_the_same_on_one_thread(tiny: Path) -> None:
    export, books = without_text(tiny, precisions=(2,)), []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            books.append(tuner(export).tune(coded_layers(export, 2), rate=rate(2)).codebooks)
        finally:
            torch.set_num_threads(threads)
    for name, book in books[0].items():
        np.testing.assert_array_equal(books[1][name], book)


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> ExportConfig:
    """An export whose 2 bits are tuned."""
    text = tmp_path / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 400)
    return ExportConfig(
        model=str(tiny),
        output=tmp_path / "bundle",
        precisions=(3, 2),
        calibration=text,
        calibration_samples=24,
        calibration_length=32,
        tune=(2,),
        targets=(),
    )


def test_an_export_tunes_codebooks_of_one_precision_alone(config: ExportConfig, tmp_path: Path) -> None:
    other = replace(config, output=tmp_path / "other", tune=())
    for export in (config, other):
        export_bundle(export)
    tuned, plain = Bundle.open(config.output), Bundle.open(other.output)
    assert tuned.manifest.configuration["tune"] == [2]
    changed = {
        (tensor.role, tensor.bits)
        for tensor in tuned.manifest.tensors
        if not np.array_equal(tuned.tensor(tensor), plain.tensor(tensor))
    }
    assert changed == {("codebook", 2)}
    assert tuned.manifest.quality is not None
    assert plain.manifest.quality is not None
    (_, ours), (_, theirs) = tuned.manifest.quality.precisions, plain.manifest.quality.precisions
    assert ours.kl < theirs.kl


def test_an_export_that_was_killed_while_it_wrote_tuned_codebooks_ends_the_same(
    config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(replace(config, output=tmp_path / "undisturbed"))
    write = Workspace.write

    def killed(self: Workspace, step: str, tensors: Any, **options: Any) -> None:
        if step.startswith("tune"):
            write(self, "half", list(tensors)[:3])
            raise KeyboardInterrupt
        write(self, step, tensors, **options)

    monkeypatch.setattr(Workspace, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(config)
    monkeypatch.setattr(Workspace, "write", write)
    monkeypatch.setattr(Tuner, "tune", None)  # is not needed again
    export_bundle(config)
    weights = [(folder / "weights.bin").read_bytes() for folder in (tmp_path / "undisturbed", config.output)]
    assert weights[0] == weights[1]


def test_what_cannot_be_tuned(config: ExportConfig) -> None:
    with pytest.raises(PmpdError, match=r"tune 4: no layer has 4 bits: choose among \[3, 2\]"):
        replace(config, tune=(4,))
    with pytest.raises(PmpdError, match="tune 2: codebooks are tuned on a calibration text: take --method guided"):
        replace(config, calibration=None, method="rtn")
    with pytest.raises(PmpdError, match=r"tune 2: .* take --calibration builtin or a file"):
        replace(config, calibration="none", method="anyprecision")


def test_without_a_tokenizer_nothing_is_tuned(config: ExportConfig, tmp_path: Path) -> None:
    folder = TINY_MODELS["llama"].save(tmp_path / "model")
    own = replace(config, model=str(folder), calibration="own")
    with pytest.raises(PmpdError, match="model has no tokenizer for a text to tune codebooks on: leave out --tune"):
        Export.prepare(own)
    assert Export.prepare(replace(own, tune=None)).config.tune == ()


def test_what_is_tuned_by_default(config: ExportConfig) -> None:
    default = replace(config, tune=None, precisions=(5, 4, 3, 2))
    assert default.resolve().tune == (4, 3, 2)
    assert replace(default, precisions=(4, 3.25, 3)).resolve().tune == (4, 3)
    assert replace(default, calibration="none").resolve().tune == ()
    assert replace(default, method="anyprecision").resolve().tune == ()
