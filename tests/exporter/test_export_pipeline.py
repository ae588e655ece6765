"""A whole export: what is in the bundle, what is checked before it is published, and what is never overwritten."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from tiny_models import TINY_MODELS

from pmpd.exporter import Export, ExportConfig, export_bundle, outline
from pmpd.exporter.bundle.workspace import Workspace
from pmpd.exporter.cli import main
from pmpd.exporter.demo import demo_model_path
from pmpd.exporter.verify import bundle as verify
from pmpd.exporter.verify import float_graph
from pmpd.runtime import Bundle, Generator
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of

GRAPHS = {"prefill.onnx": 4, "decode-4.onnx": 4, "decode-3.onnx": 3, "decode-2.onnx": 2}
PARENT = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama"].save(tmp_path_factory.mktemp("model") / "tiny")


def small(model: Path, output: Path, **options: Any) -> ExportConfig:
    """An export that takes about a second."""
    return ExportConfig(model=str(model), output=output, precisions=(2,), targets=(), **options)


def externals(graph: Path) -> dict[str, tuple[str, int, int]]:
    """Return file, offset and length of every initializer of a graph that lies outside it."""
    places = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            places[tensor.name] = (place["location"], int(place["offset"]), int(place["length"]))
    return places


def test_the_bundle_holds_what_it_says(demo_bundle: Path) -> None:
    files = {file.name for file in demo_bundle.iterdir()}
    text = {"tokenizer.json", "special_tokens_map.json", "generation_config.json"}
    assert files == {*GRAPHS, *text, "weights.bin", "README.md", "bundle.json"}
    manifest = Bundle.open(demo_bundle, verify=True).manifest
    assert manifest.files.keys() == files - {"bundle.json"}
    for name, entry in manifest.files.items():
        assert (demo_bundle / name).stat().st_size == entry.size
        assert sha256_of(demo_bundle / name) == entry.sha256


def test_the_manifest_keeps_the_resolved_configuration_and_the_checks(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    resolved = {"precisions": [4, 3, 2], "parent": 4, "prefill": 4, "head_precision": 6, "schedule": "uniform:4"}
    assert resolved.items() <= manifest.configuration.items()
    assert (manifest.source.model, manifest.architecture.family) == ("demo", "llama")
    checks = manifest.verification
    assert manifest.verified
    assert {
        "float32 graph against transformers",
        "prefill against decoding",
        *(
            name
            for p in (4, 3, 2)
            for name in (
                f"nodes of the portable graph at {p} bits",
                f"decode at {p} bits against dequantized weights",
                f"decode at {p} bits against the unquantized model",
            )
        ),
    } == checks.keys()
    for check in checks.values():
        assert check["passed"]
        assert all(figure["value"] <= figure.get("allowed", np.inf) for figure in check["figures"].values())
    assert f"of {verify.POSITIONS} positions" in checks["float32 graph against transformers"]["summary"]


def test_the_card_says_how_to_run_it_and_what_was_checked(demo_bundle: Path) -> None:
    card = (demo_bundle / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "base_model: demo" in front
    assert "license: " in front
    assert f"pmpd-run {demo_bundle.name}" in card
    assert "| output layer | 6 bits, embedding 6 bits |" in card
    assert "float32 graph against transformers" in card


def test_weights_take_the_bytes_of_parent_planes_codebooks_and_the_rest(demo_bundle: Path) -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layers = config["num_hidden_layers"]

    def planes(rows: int, columns: int, bits: int) -> int:
        return bits * rows * math.ceil(columns / 512) * 64

    def linear(rows: int, columns: int) -> int:
        return planes(rows, columns, PARENT) + rows * 2 * (2**4 + 2**3 + 2**2)

    layer = linear(hidden + 2 * kv, hidden) + linear(hidden, hidden) + linear(2 * wide, hidden) + linear(hidden, wide)
    # The embedding is stored as the output layer is, once more.
    head = planes(vocabulary, hidden, 6) + vocabulary * 2 * 2**6
    norms = 4 * hidden * (2 * layers + 1)
    rotary = 2 * 4 * config["max_position_embeddings"] * config["head_dim"] // 2
    want = layers * layer + 2 * head + norms + rotary
    assert (demo_bundle / "weights.bin").stat().st_size == pytest.approx(want, rel=0.03)


def test_every_graph_reads_a_prefix_of_the_same_planes(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    table = {tensor.name: tensor for tensor in manifest.tensors}
    for file, precision in GRAPHS.items():
        places = externals(demo_bundle / file)
        assert sum(name.endswith(".planes") for name in places) == 4 * 5 + 2
        for name, (location, offset, length) in places.items():
            parent = table[name]
            assert (location, offset) == ("weights.bin", parent.offset)
            shared = name.endswith(".planes") and name not in ("head_proj.planes", "model.embed_tokens.planes")
            assert length * (PARENT if shared else 1) == parent.length * (precision if shared else 1)


def test_nothing_is_stored_twice_and_nothing_is_left_over(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    regions = sorted((tensor.offset, tensor.offset + tensor.length) for tensor in manifest.tensors)
    assert regions[0][0] == 0
    for (_, end), (start, _) in pairwise(regions):
        assert 0 <= start - end < 64
        assert start % 64 == 0
    assert regions[-1][1] == manifest.files["weights.bin"].size
    read = set().union(*(externals(demo_bundle / file) for file in GRAPHS))
    assert read == {tensor.name for tensor in manifest.tensors}


@pytest.mark.parametrize("file", ["prefill.onnx", "decode-2.onnx"])
def test_graphs_run_in_stock_onnxruntime(file: str, demo_bundle: Path) -> None:
    """With the file's path alone: no options, no library, no manifest."""
    bundle = Bundle.open(demo_bundle)
    ids = [1, 300, 5, 77, 9]
    contract = bundle.manifest.kv_cache
    empty = np.zeros((1, contract.heads, 0, contract.head_dim), dtype=contract.dtype)
    feeds: dict[str, Any] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
    session = onnxruntime.InferenceSession(demo_bundle / file)
    feeds |= {i.name: empty for i in session.get_inputs() if i.name.startswith("past")}
    logits = session.run(["logits"], feeds)[0][0]
    generator = Generator(bundle)
    want = generator.prefill(ids)[None] if file == "prefill.onnx" else generator.decode(ids, precision=2)
    np.testing.assert_allclose(logits, want, atol=5e-3)  # the KV cache is float16


@pytest.mark.parametrize("file", ["prefill.onnx", "decode-2.onnx"])
def test_graphs_declare_what_every_way_to_run_them_takes(file: str, demo_bundle: Path) -> None:
    """One sequence, and a cache whose past and present are one buffer: kernels take nothing else."""
    contract = Bundle.open(demo_bundle).manifest.kv_cache
    session = onnxruntime.InferenceSession(demo_bundle / file)
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert {shape[0] for shape in shapes.values()} == {1}
    for layer in range(contract.layers):
        for part in ("key", "value"):
            past, present = (name.format(layer=layer, part=part) for name in (contract.past, contract.present))
            assert shapes[past] == shapes[present] == [1, contract.heads, "capacity", contract.head_dim]
    feeds: dict[str, Any] = {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)}
    empty = np.zeros((2, contract.heads, 0, contract.head_dim), dtype=contract.dtype)
    feeds |= {name: empty for name in shapes if name.startswith("past")}
    with pytest.raises(Exception, match="Got: 2 Expected: 1"):
        session.run(["logits"], feeds)


def test_other_choices_reach_the_bundle(tiny: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        model=str(tiny),
        output=tmp_path / "deep" / "down" / "bundle",
        precisions=(5, 2),
        parent=6,
        prefill=2,
        head_precision=3,
        groups=2,
        schedule="static:2@7",
        context_length=40,
        targets=(),
    )
    export_bundle(config)
    bundle = Bundle.open(config.output, verify=True)
    manifest = bundle.manifest
    assert (manifest.precisions, manifest.parent_precision, manifest.prefill_precision) == ((5, 2), 6, 2)
    assert (manifest.schedule, manifest.context_length) == ("static:5@0,2@7", 40)
    shapes = {tensor.name: tensor.shape for tensor in manifest.tensors}
    assert shapes["model.layers.0.mlp.down_proj.planes"] == (6, 48, 64)
    assert shapes["model.layers.0.mlp.down_proj.codebook.5"] == (48, 2, 32)
    assert shapes["head_proj.planes"] == (3, 131, 64)
    assert [token.precision for token in Generator(bundle).stream([1, 2], max_new_tokens=10)] == [2, *[5] * 7, 2, 2]


Change = Callable[[ir.Model], None]


def changed(build: Callable[..., ir.Model], change: Change) -> Callable[..., ir.Model]:
    """Make a graph builder make a mistake."""

    def wrong(*arguments: Any, **options: Any) -> ir.Model:
        model = build(*arguments, **options)
        change(model)
        return model

    return wrong


def doubled_attention(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 2 * node.attributes["scale"].as_float())


def forgotten_residual(model: ir.Model) -> None:
    add = [node for node in model.graph if node.op_type == "Add"][1]
    add.replace_input_with(0, add.inputs[1])


def last_position_short(model: ir.Model) -> None:
    """Count one position too few, which ONNX Runtime refuses."""
    (sub,) = (node for node in model.graph if node.op_type == "Sub")
    sub.replace_input_with(1, ir.Value(name="two", const_value=ir.tensor(np.array(2), name="two")))
    model.graph.register_initializer(sub.inputs[1])


def forgotten_sum(model: ir.Model) -> None:
    """Double the sum of the portable product instead of adding the bias."""
    function = next(function for key, function in model.functions.items() if key[1] == "BitplaneMatMul")
    (add,) = (node for node in function if node.outputs[0].name == "y_biased")
    add.replace_input_with(1, add.inputs[0])


WRONG_GRAPHS: dict[str, tuple[Any, Change, str]] = {
    "attention scale": (outline, doubled_attention, "decode at 2 bits against dequantized weights"),
    "residual": (outline, forgotten_residual, "decode at 2 bits against dequantized weights"),
    "portable product": (outline, forgotten_sum, "nodes of the portable graph at 2 bits"),
    "positions": (outline, last_position_short, "decode-2.onnx does not run"),
    "float graph": (float_graph, doubled_attention, "float32 graph against transformers"),
}


@pytest.mark.parametrize("wrong", WRONG_GRAPHS)
def test_a_wrong_graph_fails_the_export(
    wrong: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, change, check = WRONG_GRAPHS[wrong]
    output = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_graph", changed(module.build_graph, change))
        result = CliRunner().invoke(
            main, ["-q", "-m", str(tiny), "-o", str(output), "--precisions", "2", "--target", "none"]
        )
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: verification failed, {check}: ")
    assert "nothing was published" in result.stderr
    assert "--no-verify" in result.stderr
    assert not output.exists()
    export_bundle(small(tiny, output))  # what was right is kept: the next run goes on
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_no_verify_publishes_unchecked_and_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(outline, "build_graph", changed(outline.build_graph, doubled_attention))
        command = ["-m", str(tiny), "-o", str(output), "--precisions", "2", "--target", "none"]
        assert CliRunner().invoke(main, command).exit_code == 1
        result = CliRunner().invoke(main, [*command, "--no-verify"])
    assert result.exit_code == 0, result.stderr
    manifest = Bundle.open(output, verify=True).manifest
    assert (manifest.verified, manifest.verification) == (False, {})
    assert any("unverified bundle (exported with --no-verify)" in message for message in caplog.messages)
    assert "exported with `--no-verify`" in (output / "README.md").read_text()


def test_an_unusable_precision_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verify, "UNUSABLE_KL", 1e-6)
    export_bundle(small(tiny, tmp_path / "bundle"))
    (warning,) = (message for message in caplog.messages if "nats from the unquantized model" in message)
    assert warning.startswith("2 bits: ")
    assert "--calibration" in warning
    assert warning in (tmp_path / "bundle" / "README.md").read_text()
    check = Bundle.open(tmp_path / "bundle").manifest.verification["decode at 2 bits against the unquantized model"]
    assert (check["passed"], check["warning"]) == (True, warning)


def test_an_unusable_precision_that_nobody_asked_for_is_left_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verify, "UNUSABLE_KL", 0.0)  # the highest stays, and what a schedule names
    config = ExportConfig(
        model=str(tiny), output=tmp_path / "bundle", calibration="none", targets=(), schedule="static:3@8"
    )
    export_bundle(config)
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    assert bundle.manifest.precisions == (5, 3)
    assert [quality.precision for quality in bundle.manifest.quality.precisions] == [5, 3]
    assert sorted(graph.name for graph in bundle.path.glob("*.onnx")) == [
        "decode-3.onnx", "decode-5.onnx", "prefill.onnx",
    ]  # fmt: skip
    warnings = {message.split(" ")[0]: message for message in caplog.messages if "too far to be usable" in message}
    assert warnings["4"].endswith("it is left out; --precisions 5,4,3 keeps it")
    assert "left out" not in warnings["5"] + warnings["3"]
    assert warnings["4"] in (bundle.path / "README.md").read_text()

    export_bundle(replace(config, precisions=(5, 4, 3), overwrite=True))
    assert Bundle.open(tmp_path / "bundle").manifest.precisions == (5, 4, 3)


def test_weights_that_are_not_the_checkpoints_fail_the_export(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Workspace.write

    def flip(workspace: Workspace, step: str, tensors: Any, **options: Any) -> None:
        damaged = step.endswith("layers.1.mlp.down_proj")
        write(workspace, step, ((n, ~t if damaged and n.endswith(".planes") else t) for n, t in tensors), **options)

    monkeypatch.setattr(Workspace, "write", flip)
    with pytest.raises(PmpdError, match=r"verification failed, model\.layers\.1\.mlp\.down_proj\.weight at 2 bits"):
        export_bundle(small(tiny, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("kind", ["bundle", "empty folder", "file"])
def test_what_exists_is_not_touched(kind: str, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("mine") if kind == "file" else output.mkdir()
    if kind == "bundle":
        (output / "bundle.json").write_text("{}")
    with pytest.raises(PmpdError, match=r"out exists: choose another --output, or replace it with --overwrite"):
        Export.prepare(small(tiny, output))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_replaces_nothing_but_bundles(kind: str, tiny: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" if kind == "file" else tmp_path / "out" / "thesis.txt"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(PmpdError, match="is not a bundle, and --overwrite replaces only bundles"):
        export_bundle(small(tiny, tmp_path / "out", overwrite=True))
    assert precious.read_text() == "mine"


def test_overwrite_keeps_the_old_bundle_until_the_new_one_is_complete(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    export_bundle(small(tiny, output))
    old = (output / "bundle.json").read_bytes()
    publish = Workspace.publish

    def check_and_publish(workspace: Workspace) -> None:
        assert (output / "bundle.json").read_bytes() == old
        Bundle.open(output, verify=True)
        publish(workspace)

    monkeypatch.setattr(Workspace, "publish", check_and_publish)
    export_bundle(small(tiny, output, overwrite=True, groups=2))
    assert Bundle.open(output, verify=True).manifest.configuration["groups"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_small_disk_is_noticed_before_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Export.prepare(small(tiny, tmp_path / "bundle")).plan.size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(PmpdError, match=r"has \d+ kB free, the bundle takes \d+ kB more: make room, or "):
        export_bundle(small(tiny, tmp_path / "new" / "bundle"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    Export.prepare(small(tiny, tmp_path / "bundle"))


def test_a_disk_that_fills_up_is_one_line_and_no_loss(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = CliRunner().invoke(
            main, ["-q", "-m", str(tiny), "-o", str(tmp_path / "bundle"), "--precisions", "2", "--target", "none"]
        )
    assert result.exit_code == 1
    assert "(No space left on device)" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "bundle").exists()
    export_bundle(small(tiny, tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_output_below_a_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PmpdError, match=r"cannot write to .*/file \(Not a directory\): choose another --output"):
        export_bundle(small(tiny, tmp_path / "file" / "bundle"))


def test_a_read_only_place_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> None:  # a superuser, who may run the tests, writes to any real folder
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PmpdError, match=r"cannot write to .* \(Read-only file system\): choose another --output"):
        export_bundle(small(tiny, tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_the_plan_adds_up(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = Export.prepare(ExportConfig(model=str(tiny), output=tmp_path / "bundle", targets=()))
    with caplog.at_level(logging.INFO, logger="pmpd"):
        manifest = export.run()
    assert manifest.files["weights.bin"].size == export.plan.size
    roles = {tensor.role for tensor in manifest.tensors}
    assert sum(map(export.plan.nbytes, roles)) == pytest.approx(export.plan.size, abs=64 * len(manifest.tensors))
    assert export.plan.nbytes("embedding") == 131 * (6 * 64 + 2 * 2**6)
    # Every weight matrix of the model, and the embedding, once.
    layer = 4 * 48 * 48 + 3 * 48 * 77
    assert export.outline.parameters == manifest.architecture.parameters == 2 * layer + 2 * 131 * 48
