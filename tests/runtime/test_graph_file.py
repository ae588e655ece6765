"""ONNX files against the manifest: what they say of their weights is read strictly, and a disagreement is refused.

Without the comparison, ONNX Runtime would read a tensor that the manifest makes too short beyond its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pmpd.runtime import Bundle, BundleError
from pmpd.runtime.engine.sessions import open_session
from pmpd.runtime.format.graph_file import External, GraphFile, Initializer, check_graph, read_graph_file
from pmpd.runtime.format.protobuf import read_fields, read_varints

GOLDEN = Path(__file__).parents[1] / "golden" / "v1-llama"
PATH = Path("g.onnx")
DTYPES = {1: "float32", 2: "uint8", 7: "int64", 10: "float16"}
NORM, CODEBOOK = "model.layers.0.post_attention_layernorm.weight", "head_proj.codebook.6"


def tensor(document: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["tensors"] if entry["name"] == name)
    return found


def move_to_end(document: Any, entry: dict[str, Any], *, length: int, **changes: Any) -> None:
    """Change a tensor and let it end where the weight file and its last page of memory end."""
    size = -(-(document["files"]["weights.bin"]["size"] + length) // 4096) * 4096
    document["files"]["weights.bin"]["size"] = size
    entry.update(changes, length=length, offset=size - length)


def shorten(document: Any, name: str, dtype: str) -> None:
    entry = tensor(document, name)
    move_to_end(document, entry, length=entry["length"] // 2, dtype=dtype)


def more_groups(document: Any) -> None:
    entry = tensor(document, "model.layers.0.mlp.down_proj.codebook.4")
    move_to_end(document, entry, length=2 * entry["length"], shape=[96, 2, 16])


def other_place(document: Any) -> None:
    a, b = tensor(document, NORM), tensor(document, "model.layers.1.post_attention_layernorm.weight")
    a["offset"], b["offset"] = b["offset"], a["offset"]


RUN = """
import sys
from pmpd.runtime import Bundle, Generator, PmpdError
try:
    generator = Generator(Bundle.open(sys.argv[1]), kernels=False, threads=1)
    print([token.id for token in generator.stream([48, 129, 109, 114], max_new_tokens=8)])
except PmpdError as error:
    print(f"{type(error).__name__}: {error}")
"""


# Before `check_graph`, in this order: another text, SIGSEGV, another text, another text, the right text, another text.
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: shorten(d, CODEBOOK, "uint8"), CODEBOOK),
        (lambda d: shorten(d, NORM, "float16"), f"{NORM}': float32 [96] at byte 109504 of 'weights.bin' in the graph"),
        (more_groups, "down_proj.codebook.4': float16 [96, 1, 16] at byte 182592 of 'weights.bin' in the graph"),
        (lambda d: tensor(d, "head_proj.planes").update(dtype="float16", shape=[6, 131, 32]), "head_proj.planes"),
        (lambda d: tensor(d, "model.norm.weight").update(name="norm"), "lists no such tensor for 4 bits"),
        (other_place, f"{NORM}': float32 [96] at byte 109504"),
    ],
)
def test_a_tensor_that_contradicts_the_graph_is_refused(
    edit: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))
    document = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    edit(document)
    (path / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    os.truncate(path / "weights.bin", document["files"]["weights.bin"]["size"])
    process = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("BundleError: ")
    assert process.stdout.count("\n") == 1
    assert message in process.stdout


def test_a_graph_may_leave_out_a_coarse_codebook_and_a_bound(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN.parent / "v2-llama", tmp_path / "bundle"))
    document = json.loads((path / "bundle.json").read_text(encoding="utf-8")) | {"version": 3}
    codebook = tensor(document, CODEBOOK) | {"name": "head_proj.codebook.3", "bits": 3, "shape": [131, 1, 8]}
    bound = {
        **codebook,
        "name": "head_proj.bound",
        "role": "bound",
        "bits": None,
        "dtype": "float16",
        "shape": [2, 131],
    }
    basis = {**bound, "name": "head_proj.basis", "role": "basis", "dtype": "float32", "shape": [1, 48]}
    document["tensors"] += [codebook, basis, bound]
    move_to_end(document, basis, length=192)
    move_to_end(document, bound, length=131 * 4)
    bound["offset"] -= bound["offset"] % 64
    codebook.update(length=131 * 16, offset=bound["offset"] - 64 * 40)
    (path / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    os.truncate(path / "weights.bin", document["files"]["weights.bin"]["size"])
    bundle = Bundle.open(path)
    for graph in bundle.manifest.graphs:
        check_graph(bundle.manifest, graph, path / graph.file)
    sessions = [open_session(bundle, graph, threads=1) for graph in bundle.manifest.graphs]
    assert len(sessions) == 4


def model(*, nodes: list[Any] | None = None, tensors: list[Any] | None = None) -> onnx.ModelProto:
    nodes = nodes if nodes is not None else [helper.make_node("Identity", ["x"], ["y"], name="node")]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors or []))


def external_tensor(name: str = "w", dims: tuple[int, ...] = (4,), dtype: int = 1, **entries: str) -> onnx.TensorProto:
    proto = TensorProto(name=name, dims=dims, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, value in (entries or {"location": "weights.bin", "offset": "64", "length": "16"}).items():
        proto.external_data.add(key=key, value=value)
    return proto


def read(proto: onnx.ModelProto) -> GraphFile:
    return read_graph_file(proto.SerializeToString(), PATH)


def by_onnx(data: bytes) -> dict[str, Initializer]:
    """What the package onnx reads: the oracle."""
    found = {}
    for proto in onnx.ModelProto.FromString(data).graph.initializer:
        entries = {entry.key: entry.value for entry in proto.external_data}
        external = None
        if proto.data_location == TensorProto.EXTERNAL:
            external = External(entries.get("location", ""), int(entries["offset"]), int(entries["length"]))
        dtype = DTYPES.get(proto.data_type, f"type {proto.data_type}")
        found[proto.name] = Initializer(proto.name, dtype, tuple(proto.dims), external)
    return found


@pytest.mark.parametrize("file", sorted(path.name for path in GOLDEN.glob("*.onnx")))
def test_a_real_graph_is_read_as_onnx_reads_it(file: str) -> None:
    data = (GOLDEN / file).read_bytes()
    found = read_graph_file(data, PATH)
    assert found.initializers == by_onnx(data)
    assert len(found.initializers) > 25
    assert {"logits", "present.1.value"} < found.others


def test_every_graph_of_a_bundle_agrees_with_its_manifest(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    for graph in bundle.manifest.graphs:
        check_graph(bundle.manifest, graph, bundle.path / graph.file)
        other = next(other for other in bundle.manifest.graphs if other.precision != graph.precision)
        with pytest.raises(BundleError, match=r"and bundle\.json disagree about tensor"):
            check_graph(bundle.manifest, graph, bundle.path / other.file)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@given(
    st.dictionaries(names, st.tuples(st.lists(st.integers(0, 2**63 - 1), max_size=4), st.integers(1, 20)), max_size=4),
    st.integers(0, 2**60),
)
def test_any_initializer_is_read_as_onnx_reads_it(tensors: dict[str, tuple[list[int], int]], offset: int) -> None:
    protos = [
        external_tensor(name, tuple(dims), dtype, location=name, offset=str(offset), length=str(i), checksum="x")
        if i % 2
        else TensorProto(name=name, dims=dims, data_type=dtype)
        for i, (name, (dims, dtype)) in enumerate(tensors.items())
    ]
    data = model(tensors=protos).SerializeToString()
    assert read_graph_file(data, PATH).initializers == by_onnx(data)


def test_packed_dimensions() -> None:
    data = model(tensors=[TensorProto(name="w", data_type=1)]).SerializeToString()
    packed = b"\x0a\x03\x04\x80\x01" + b"\x10\x01\x42\x01w"  # field 1: 4, 128; field 2: float; field 8: "w"
    plain = b"\x10\x01\x42\x01w"
    assert data.count(b"\x2a\x05" + plain) == 1
    graph = data.index(b"\x3a")
    grown = data.replace(b"\x2a\x05" + plain, b"\x2a\x0a" + packed)
    grown = grown[: graph + 1] + bytes([grown[graph + 1] + 5]) + grown[graph + 2 :]
    assert read_graph_file(grown, PATH).initializers["w"].shape == by_onnx(grown)["w"].shape == (4, 128)


def nested(tensors: list[Any], *, inputs: list[Any] | None = None, outputs: tuple[str, ...] = ("z",)) -> Any:
    node = helper.make_node("Identity", ["x"], list(outputs))
    body = helper.make_graph([node], "body", inputs or [], [], tensors)
    return helper.make_node("If", ["c"], ["y"], then_branch=body)


def test_every_other_name_is_known() -> None:
    value = helper.make_tensor_value_info("input", 1, [])
    proto = model(nodes=[nested([TensorProto(name="constant", data_type=1)], inputs=[value])])
    function = proto.functions.add(name="f", domain="d")
    function.node.append(nested([], outputs=("deep",)))
    assert read(proto).others == {"constant", "input", "y", "z", "deep"}


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (onnx.ModelProto(), "it has 0 graphs"),
        (model(tensors=[external_tensor(), external_tensor()]), "two initializers 'w'"),
        (model(tensors=[external_tensor("")]), "an initializer without name or type"),
        (model(tensors=[external_tensor(location="w")]), "external data without offset or length"),
        (model(tensors=[external_tensor(offset="-1", length="1")]), "external data without offset or length"),
        (model(tensors=[external_tensor(offset="1_0", length="1")]), "external data without offset or length"),
        (model(tensors=[external_tensor(offset="9" * 5000, length="1")]), "external data without offset or length"),
        (model(nodes=[nested([external_tensor()])]), "the constant 'w' of a nested graph is external"),
    ],
)
def test_what_is_not_understood_is_refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        read(proto)
    assert message in str(caught.value)
    assert str(caught.value).startswith("g.onnx is not an ONNX model of a bundle (")


def test_more_that_is_refused() -> None:
    sparse = model()
    sparse.graph.sparse_initializer.add().values.name = "w"
    twice = external_tensor()
    twice.external_data.add(key="offset", value="0")
    undecided = external_tensor()
    undecided.data_location = TensorProto.DEFAULT
    deep = nested([])
    for _ in range(20):
        deep = helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([deep], "body", [], []))
    for proto, message in (
        (sparse, "sparse initializers"),
        (model(tensors=[twice]), "external data with two 'offset'"),
        (model(tensors=[undecided]), "neither external nor in the file"),
        (model(nodes=[deep]), "nested too deeply"),
    ):
        with pytest.raises(BundleError, match=message):
            read(proto)
    with pytest.raises(BundleError, match="it has 2 graphs"):  # protobuf merges them
        read_graph_file(2 * model().SerializeToString(), PATH)
    with pytest.raises(BundleError, match="more than 1,000,000 fields"):
        read_graph_file(b"\x08\x01" * 1_000_001, PATH)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08", "a number that does not end"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "larger than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x00", "a number that does not end"),
        (b"\x3a\x05abc", "a field of 5 bytes where 3 are left"),
        (b"\x3d\x00", "a field of 4 bytes where 1 are left"),
        (b"\x39\x00", "a field of 8 bytes where 1 are left"),
        (b"\x3b", "wire type 3"),
        (b"\x3f", "wire type 7"),
        (b"\x02\x00", "field number 0"),
        (b"\x38\x05", "a number where a message or a text belongs"),
        (b"\x3a\x05\x0a\x03\x1a\x01\xff", "can't decode byte 0xff"),  # a node's name
        (b"\x3a\x05\x0a\x03\x22\x01\xff", "can't decode byte 0xff"),  # its operator
        (b"\x3a\x07\x0a\x05\x2a\x03\x0a\x01\xff", "can't decode byte 0xff"),  # the name of an attribute
    ],
)
def test_bytes_that_are_not_a_message(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_graph_file(data, PATH)


def test_fields_of_every_wire_type() -> None:
    data = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1a\x02hi" + b"\x25" + bytes(4)
    assert dict(read_fields(memoryview(data))) == {1: 150, 2: bytes(8), 3: b"hi", 4: bytes(4)}
    assert list(read_varints(memoryview(b"\x00\x7f\x80\x01"))) == [0, 127, 128]


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        read_graph_file(data, PATH)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_graph_is_read_as_onnx_reads_it_or_refused(data: st.DataObject) -> None:
    damaged = bytearray((GOLDEN / "decode-2.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        found, expected = read_graph_file(bytes(damaged), PATH), by_onnx(bytes(damaged))
    except (BundleError, DecodeError):  # ours leaves out what is not about weights, so onnx may refuse more
        return
    assert found.initializers == expected
