"""Precisions that are mixes: an export that chooses them, its graphs, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from test_export_resume import interrupted
from tiny_models import TINY_MODELS, save_with_tokenizer

from pmpd.eval.speed.traffic import step_bytes
from pmpd.exporter import Export, ExportConfig, export_bundle
from pmpd.exporter.bundle.layers import checkpoint_shapes
from pmpd.exporter.bundle.workspace import Workspace
from pmpd.exporter.cli import main
from pmpd.exporter.outline import Outline
from pmpd.exporter.quantize import AnyPrecision
from pmpd.exporter.quantize.losses import predicted_losses
from pmpd.npu_backend import Model, generate, read_hardware
from pmpd.runtime import Bundle, Generator, StaticSchedule
from pmpd.runtime.format.bitplanes import group_size
from pmpd.runtime.format.manifest import Source
from pmpd.runtime.format.precision import mean_planes
from pmpd.runtime.format.tensor import Tensor

Once = Callable[[str, Callable[[Path], object]], Path]
MIXED = {"precisions": (4, 3.25, 3), "targets": (), "calibration_samples": 4, "calibration_length": 16}


def save_model(folder: Path) -> dict[str, Any]:
    """Save a model and a text; return the options of an export of it that takes seconds."""
    text = folder / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 20)
    return {"model": str(save_with_tokenizer(folder / "tiny")), "calibration": text, **MIXED}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mixed(options: dict[str, Any], once: Once) -> Bundle:
    """A bundle with a mix, verified: each graph gives what transformers gives with the weights that it stands for."""
    path = once("mixed-bundle", lambda folder: export_bundle(ExportConfig(**options, output=folder / "mixed")))
    return Bundle.open(path / "mixed", verify=True)


def planes_of(bundle: Bundle) -> dict[str, Tensor]:
    return {tensor.layer or "": tensor for tensor in bundle.manifest.tensors if tensor.nested}


def test_a_mix_reads_more_planes_where_it_pays(mixed: Bundle) -> None:
    manifest, planes = mixed.manifest, planes_of(mixed)
    assert manifest.verified
    assert manifest.quality is not None
    mix = manifest.mixes["3.25"]
    assert set(mix.values()) == {3, 4}
    values = [layer for layer in mix if layer.endswith(".self_attn.qkv_proj.v_proj")]
    assert len(values) == manifest.architecture.layers
    assert 3.1 < mean_planes(mix, {layer: tensor.length // 4 for layer, tensor in planes.items()}) <= 3.25
    four, middle, three = manifest.quality.precisions
    assert (four.precision, middle.precision, three.precision) == (4, 3.25, 3)
    assert four.kl < middle.kl < three.kl


def test_the_graph_of_a_mix_reads_its_planes(mixed: Bundle) -> None:
    graph = onnx.load(mixed.path / "decode-3.25.onnx", load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for layer, planes in mixed.manifest.mixes["3.25"].items():
        assert shapes[f"{layer}.planes"][0] == planes
        assert f"{layer}.codebook.{planes}" in shapes
        assert f"{layer}.codebook.{7 - planes}" not in shapes


def test_a_schedule_goes_through_a_mix(mixed: Bundle) -> None:
    generator = Generator(mixed, kernels=False)
    trace = generator.generate([1, 2, 3], max_new_tokens=6, schedule="static:3.25@1,3@3", stop_ids=())
    assert [token.precision for token in trace.tokens] == [4, 4, 3.25, 3.25, 3, 3]
    assert trace.average_bits == pytest.approx((4 + 3.25 + 3.25 + 3 + 3) / 5)
    card = (mixed.path / "README.md").read_text(encoding="utf-8")
    assert "| planes at 3.25 bits | " in card


def test_traffic_is_that_of_the_planes_that_are_read(mixed: Bundle) -> None:
    manifest = mixed.manifest
    four, middle, three = (step_bytes(manifest, precision=p, positions=0) for p in manifest.precisions)
    more = [tensor for layer, tensor in planes_of(mixed).items() if manifest.mixes["3.25"][layer] == 4]
    books = {(tensor.layer, tensor.bits): tensor.length for tensor in manifest.tensors if tensor.role == "codebook"}
    added = sum(tensor.length // 4 + books[tensor.layer, 4] - books[tensor.layer, 3] for tensor in more)
    assert three < middle < four
    assert middle - three == pytest.approx(added)


def test_an_accelerator_reads_the_planes_of_a_mix(mixed: Bundle) -> None:
    model = Model.open(mixed.path)
    read = {
        precision: sum(tensor.nbytes for name, tensor in graph.initializers.items() if name.endswith("_proj.planes"))
        for precision, graph in model.decode.items()
    }
    sizes = {layer: tensor.length // 4 for layer, tensor in planes_of(mixed).items()}
    head = read[3] - 3 * sum(sizes.values())
    assert read[3.25] == head + sum(sizes[layer] * planes for layer, planes in mixed.manifest.mixes["3.25"].items())
    schedule = StaticSchedule(((4, 0), (3.25, 2), (3, 4)))
    generation = generate(model, read_hardware("npu-4k"), prompt=4, tokens=7, schedule=schedule)
    rates = [1 / float(np.mean(generation.decode[precision].seconds)) for precision in (4, 3.25, 3)]
    assert rates == sorted(rates)
    assert generation.average_bits == pytest.approx(20.5 / 6)


def test_kernels_are_built_for_all_that_a_layer_may_read(options: dict[str, Any], tmp_path: Path) -> None:
    config = ExportConfig(**options | {"precisions": (3.5, 2.75)}, output=tmp_path / "out")
    assert Export.prepare(config).kernel_precisions == (6, 4, 3, 2)


def test_losses_survive_an_interruption(options: dict[str, Any], mixed: Bundle, tmp_path: Path) -> None:
    config = ExportConfig(**options, output=tmp_path / "bundle", verify=False)
    with interrupted(Workspace, "write", after=6):
        export_bundle(config)
    manifest = export_bundle(config)
    assert manifest.mixes == mixed.manifest.mixes


@pytest.mark.parametrize("kind", ["guided", "outputs", "fisher"])
def test_losses_are_errors_weighted_by_what_they_matter(kind: str) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 40)).astype(np.float32)
    factors = (random.standard_normal((size, size)).astype(np.float32) for size in (40, 6))
    H, B = (factor @ factor.T for factor in factors)
    statistics, hessian = {"guided": H}, np.kron(np.eye(6), H)
    if kind == "outputs":
        statistics, hessian = {"guided": H, "outputs": B[None]}, np.kron(B * (6 / np.trace(B)), H)
    if kind == "fisher":
        statistics = {"fisher": random.random((6, 40), np.float32)}
        hessian = np.diag(statistics["fisher"].reshape(-1))
    nested = AnyPrecision(precisions=(4, 2), parent=5, groups=2).quantize(weight)
    losses = predicted_losses(weight, nested, 5, statistics)
    size = group_size(40, 2)
    for bits, book in nested.codebooks.items():
        rows = enumerate(nested.codes >> (5 - bits))
        errors = [book[n, k // size, code] - weight[n, k] for n, row in rows for k, code in enumerate(row)]
        assert losses[bits] == pytest.approx(errors @ hessian @ errors, rel=1e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_split_layers_take_the_same_tensors(name: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name].save(tmp_path / "tiny")
    document = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = ExportConfig(model=str(model), output=tmp_path / "out", targets=()).resolve()
    networks = [
        Outline.of(replace(config, precisions=precisions), Source(model="tiny"), document).network
        for precisions in ((4, 3), (4, 3.25, 3))
    ]
    merged, split = (sorted(checkpoint_shapes(network)) for network in networks)
    assert split == merged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--precisions", "4,3.25,3", "--calibration", "none"],
            "precision 3.25: which layers read more planes follows",
        ),
        (["--precisions", "4,3.25,3", "--skeleton"], "of which a skeleton has none: take whole precisions"),
        (
            ["--precisions", "3.5,3", "--method", "gptq", "--calibration", "own"],
            "precision 3.5: method gptq cannot tell which layers should read more planes: take --method anyprecision",
        ),
        (["--precisions", "4,3.255"], "'3.255' is not a precision like 4 or 3.25"),
        (["--precisions", "4,3.25", "--calibration", "own", "--parent", "3"], "parent precision 3 is lower than"),
    ],
)
def test_what_a_mix_takes_is_said_in_a_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["-m", "demo", "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
