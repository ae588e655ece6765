"""The operator library around the kernels, with scalar kernels in C in place of TVM's: no TVM is needed here."""

from __future__ import annotations

import ctypes
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scalar_library import KERNELS, link

from pmpd.exporter.graph.operators import bitplane_matmul as function_body
from pmpd.runtime.errors import MissingExtraError
from pmpd.runtime.format.bitplanes import bitplane_matmul, pack
from pmpd.tvm_kernels.library.link import link_library
from pmpd.tvm_kernels.targets import TARGETS, host_target

Feeds = dict[str, npt.NDArray[Any]]


def expected_kernel(p: int, G: int, M: int, accuracy: str, *, common: bool = True) -> str:
    """Return the right one of scalar_kernels.c, for a machine that has, or has not, the common feature."""
    rows = "one" if M <= 1 else "many"
    if G > 1 or p == 8:
        return "any_scalar"
    if accuracy == "int8" and (p == 3 or (p == 4 and rows == "one" and common)):
        return f"int8_{p}_{'many' if p == 3 else 'one'}"
    return f"exact_{p}_{'many' if p == 7 else rows}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator library of this machine, with the kernels of scalar_kernels.c."""
    return link(tmp_path_factory.mktemp("library") / "libpmpd_ops.so")


class Reports:
    """The library's exported functions besides the one for ONNX Runtime."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        functions.pmpd_ops_info.restype = ctypes.c_char_p
        functions.pmpd_ops_report.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
        functions.pmpd_ops_report.restype = ctypes.c_size_t
        functions.pmpd_ops_reset.argtypes = [ctypes.c_char_p]
        functions.pmpd_ops_reset.restype = None
        self.functions = functions

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = json.loads(self.functions.pmpd_ops_info())
        return info

    def nodes(self, session: str) -> list[dict[str, Any]]:
        size = self.functions.pmpd_ops_report(session.encode(), None, 0) + 1
        buffer = ctypes.create_string_buffer(size)
        assert self.functions.pmpd_ops_report(session.encode(), buffer, size) == size - 1 == len(buffer.value)
        nodes: list[dict[str, Any]] = json.loads(buffer.value)
        return nodes


@pytest.fixture(scope="module")
def reports(library: Path) -> Reports:
    return Reports(library)


def model(K: int, *, bias: bool = False, leading: int = 1, name: str = "node", x: int = TensorProto.FLOAT) -> bytes:
    """Return a model of one BitplaneMatMul, function body included, that says nothing of its inputs' sizes."""
    shapes = {"X": (x, leading + 1), "planes": (TensorProto.UINT8, 3), "codebook": (TensorProto.FLOAT16, 3)}
    if bias:
        shapes["bias"] = TensorProto.FLOAT, 1
    inputs = [helper.make_tensor_value_info(key, dtype, [None] * rank) for key, (dtype, rank) in shapes.items()]
    names = [*shapes, *([""] * (not bias))]
    node = helper.make_node("BitplaneMatMul", names, ["Y"], name, domain="pmpd", K=K)
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None] * (leading + 1))
    made: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        functions=[function_body()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("pmpd", 1)],
        ir_version=11,
    )
    return bytes(made.SerializeToString())


def open_session(library: Path | None, model: bytes, *, threads: int = 1, **entries: str) -> Any:
    """Open a session with entries like `accuracy="int8"`; with no library it runs the function body."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(f"pmpd.{key}", value)
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def layer(N: int, K: int, p: int, G: int = 1, *, bias: bool = False, seed: int = 0) -> Feeds:
    """Return all inputs but X."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {
        "planes": pack(rng.integers(0, 2**p, (N, K)).astype(np.uint8), p),
        "codebook": rng.standard_normal((N, G, 2**p)).astype(np.float16),
    }
    return {**feeds, "bias": rng.standard_normal(N).astype(np.float32)} if bias else feeds


def activations(*shape: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(x: npt.NDArray[np.float32], feeds: Feeds) -> npt.NDArray[np.float32]:
    return bitplane_matmul(x, feeds["planes"], feeds["codebook"], feeds.get("bias"))


@settings(max_examples=60)
@given(
    N=st.integers(1, 70),
    K=st.integers(1, 600),
    p=st.integers(1, 8),
    G=st.integers(1, 3),
    M=st.sampled_from([0, 1, 2, 17]),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
    accuracy=st.sampled_from(["exact", "int8"]),
)
@example(N=12, K=512, p=4, G=1, M=1, bias=False, threads=2, accuracy="int8")  # one whole chunk, one whole line
@example(N=13, K=513, p=7, G=1, M=1, bias=True, threads=2, accuracy="exact")  # one more of both
@example(N=3, K=5000, p=3, G=1, M=17, bias=True, threads=2, accuracy="int8")  # several threads pack
@example(N=5, K=8, p=2, G=5, M=2, bias=True, threads=1, accuracy="exact")  # more groups than bytes in a row
def test_agrees_with_numpy(
    library: Path, reports: Reports, N: int, K: int, p: int, G: int, M: int, bias: bool, threads: int, accuracy: str
) -> None:
    feeds, x = layer(N, K, p, G, bias=bias), activations(M, K)
    session = open_session(library, model(K, bias=bias), threads=threads, accuracy=accuracy, session="numpy")
    y = session.run(None, {"X": x, **feeds})[0]
    assert y.dtype == np.float32
    assert y.shape == (M, N)
    np.testing.assert_allclose(y, reference(x, feeds), rtol=1e-5, atol=1e-5)
    [node] = reports.nodes("numpy")
    assert (node["bits"], node["n"], node["k"], node["calls"]) == (p, N, K, 1)
    assert node["kernel"] == expected_kernel(p, G, M, accuracy, common=bool(reports.info()["features"]))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (1, 2, 1, 2)])
def test_keeps_leading_axes(library: Path, leading: tuple[int, ...]) -> None:
    feeds, x = layer(7, 20, 4), activations(*leading, 20)
    y = open_session(library, model(20, leading=len(leading))).run(None, {"X": x, **feeds})[0]
    assert y.shape == (*leading, 7)
    np.testing.assert_allclose(y, reference(x, feeds), rtol=1e-5, atol=1e-5)


def test_the_kernel_runs_in_place_of_the_function_body(library: Path, reports: Reports) -> None:
    feeds, x = layer(40, 30, 4, bias=True), activations(2, 30)
    graph = model(30, bias=True)
    bare = open_session(None, graph, session="body")
    fast = open_session(library, graph, session="body")
    assert [node["kernel"] for node in reports.nodes("body")] == [None]
    y = [session.run(None, {"X": x, **feeds})[0] for session in (bare, fast)]
    assert [node["calls"] for node in reports.nodes("body")] == [1]
    np.testing.assert_allclose(y[0], y[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("X", (2, 600), r"input X has shape \[2, 600\], wanted \[..., 601\] of up to 8 axes"),
        ("planes", (0, 5, 128), r"input planes has shape \[0, 5, 128\], wanted \[1 to 8, N, 128\] for K = 601"),
        ("planes", (9, 5, 128), r"input planes has shape \[9, 5, 128\], wanted \[1 to 8, N, 128\]"),
        ("planes", (3, 5, 64), r"input planes has shape \[3, 5, 64\], wanted \[1 to 8, N, 128\]"),
        (
            "codebook",
            (4, 1, 8),
            r"input codebook has shape \[4, 1, 8\], wanted \[5, groups, 8\] for 3 planes of 5 rows",
        ),
        ("codebook", (5, 0, 8), r"input codebook has shape \[5, 0, 8\], wanted \[5, groups, 8\]"),
        ("codebook", (5, 1, 16), r"input codebook has shape \[5, 1, 16\], wanted \[5, groups, 8\]"),
        ("bias", (6,), r"input bias has shape \[6\], wanted \[5\]"),
    ],
)
def test_wrong_shapes_are_refused(library: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = {"X": activations(2, 601), **layer(5, 601, 3, bias=True)}
    session = open_session(library, model(601, bias=True, name="layers.0.mlp"))
    session.run(None, feeds)
    with pytest.raises(Exception, match=r"BitplaneMatMul 'layers\.0\.mlp': " + message):
        session.run(None, {**feeds, name: np.zeros(shape, feeds[name].dtype)})
    session.run(None, feeds)


def test_too_many_axes_are_refused(library: Path) -> None:
    x = activations(*[1] * 8, 20)
    with pytest.raises(Exception, match=r"has shape \[1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\], wanted \[\.\.\., 20\]"):
        open_session(library, model(20, leading=8)).run(None, {"X": x, **layer(3, 20, 2)})


def test_wrong_types_are_refused(library: Path) -> None:
    with pytest.raises(Exception, match=r"'tensor\(float16\)' of input parameter \(X\) of operator \(BitplaneMatMul\)"):
        open_session(library, model(20, x=TensorProto.FLOAT16))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("codebook", np.uint8, "input codebook is uint8, wanted float16"),
        ("codebook", np.int64, "input codebook is int64, wanted float16"),
        ("planes", np.float32, "input planes is float32, wanted uint8"),
    ],
)
def test_initializers_of_another_type_are_refused(
    library: Path, tmp_path: Path, name: str, dtype: Any, message: str
) -> None:
    """ONNX Runtime takes them: it does not compare what is added to a session with what the graph declares."""
    weights = layer(5, 40, 3)
    graph = onnx.load_from_string(model(40))
    for value in graph.graph.input[1:]:
        shape = weights[value.name].shape
        tensor = TensorProto(name=value.name, data_type=value.type.tensor_type.elem_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        graph.graph.initializer.append(tensor)
    del graph.graph.input[1:]
    (tmp_path / "graph.onnx").write_bytes(graph.SerializeToString())
    (tmp_path / "weights.bin").touch()
    changed = {**weights, name: np.zeros(weights[name].shape, dtype)}
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in changed.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    for key, value in values.items():
        options.add_initializer(key, value)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=f"BitplaneMatMul 'node': {message}"):
        session.run(None, {"X": activations(1, 40)})


@pytest.mark.parametrize("K", [0, -1, 2**31])
def test_wrong_attributes_are_refused(library: Path, K: int) -> None:
    with pytest.raises(Exception, match=f"BitplaneMatMul 'node': attribute K is {K}, wanted a positive 32-bit number"):
        open_session(library, model(K))


@pytest.mark.parametrize(
    ("variable", "entries", "message"),
    [
        ("", {"accuracy": "int4"}, "session config entry pmpd.accuracy is 'int4': choose one of exact, int8"),
        ("avx3", {}, "environment variable PMPD_MAX_ISA is 'avx3': choose one of portable, "),
    ],
)
def test_unknown_settings_are_refused(
    library: Path, monkeypatch: pytest.MonkeyPatch, variable: str, entries: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("PMPD_MAX_ISA", variable)
    with pytest.raises(Exception, match=message):
        open_session(library, model(20), **entries)


def test_old_onnx_runtime_is_refused(library: Path) -> None:
    """Called as a release would call it that has no API of the wanted version."""
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)
    messages = []
    create = create_status(lambda _code, message: messages.append(message.decode()))
    first = (create_status * 1)(create)
    text = ctypes.create_string_buffer(b"1.14.0")
    version = get_version(lambda: ctypes.addressof(text))
    api = get_api(lambda number: ctypes.addressof(first) if number == 1 else None)
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(function, ctypes.c_void_p) for function in (api, version)))
    ctypes.CDLL(str(library)).RegisterCustomOps(None, base)
    assert messages == ["the pmpd operators need ONNX Runtime 1.17 or later, this is 1.14.0"]


def test_sessions_keep_their_settings(library: Path, reports: Reports) -> None:
    feeds, x = layer(30, 40, 3), activations(1, 40)
    sessions = [
        (tag, open_session(library, model(40), accuracy=accuracy, session=tag))
        for tag, accuracy in (("a", "exact"), ("a", "int8"), ("b", "exact"))
    ]
    for number in (0, 1, 2, 1, 0):
        y = sessions[number][1].run(None, {"X": x, **feeds})[0]
        np.testing.assert_allclose(y, reference(x, feeds), rtol=1e-5, atol=1e-5)
    found = {tag: [(node["kernel"], node["calls"]) for node in reports.nodes(tag)] for tag in ("a", "b")}
    assert found == {"a": [("exact_3_one", 2), ("int8_3_many", 2)], "b": [("exact_3_one", 1)]}
    del sessions[0]
    assert [node["kernel"] for node in reports.nodes("a")] == ["int8_3_many"]


def test_one_session_runs_in_several_threads(library: Path, reports: Reports) -> None:
    feeds = layer(90, 200, 4)
    session = open_session(library, model(200), threads=2, session="threads")
    inputs = [activations(M, 200, seed=seed) for seed, M in enumerate([1, 2, 3, 1] * 20)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: session.run(None, {"X": x, **feeds})[0], inputs))
    for x, y in zip(inputs, outputs, strict=True):
        np.testing.assert_allclose(y, reference(x, feeds), rtol=1e-5, atol=1e-5)
    assert [node["calls"] for node in reports.nodes("threads")] == [len(inputs)]


def test_report_counts_and_resets(library: Path, reports: Reports) -> None:
    name = 'läyer "0"\\mlp\n'
    session = open_session(library, model(20, name=name), session="counted")
    assert reports.nodes("counted") == [
        {
            "name": name,
            "op": "BitplaneMatMul",
            "bits": 0,
            "n": 0,
            "k": 20,
            "kernel": None,
            "calls": 0,
            "nanoseconds": 0,
            "finished": 0,
        }
    ]
    for _ in range(3):
        session.run(None, {"X": activations(1, 20), **layer(7, 20, 4)})
    [node] = reports.nodes("counted")
    assert node["calls"] == 3
    assert node["nanoseconds"] > 0
    assert node["finished"] == 21
    reports.functions.pmpd_ops_reset(b"another")
    assert reports.nodes("counted") == [node]
    reports.functions.pmpd_ops_reset(b"counted")
    assert reports.nodes("counted") == [{**node, "calls": 0, "nanoseconds": 0, "finished": 0}]


def test_report_fills_no_more_than_the_buffer(library: Path, reports: Reports) -> None:
    session = open_session(library, model(20), session="short")
    buffer = ctypes.create_string_buffer(b"?" * 20)
    length = reports.functions.pmpd_ops_report(b"short", buffer, 10)
    assert length > 20
    assert buffer.raw[:10] == b'[{"name":\0'
    assert buffer.raw[10:20] == b"?" * 10
    del session


def test_info_lists_what_would_run(reports: Reports) -> None:
    info = reports.info()
    assert info["target"] == host_target()
    common = bool(info["features"])
    assert {
        (entry["bits"], entry["accuracy"], entry["rows"]): entry["kernel"]
        for entry in info["kernels"]
        if "bits" in entry
    } == {
        (p, accuracy, rows): expected_kernel(p, 1, 1 if rows == "one" else 2, accuracy, common=common)
        for p in range(1, 9)
        for accuracy in ("exact", "int8")
        for rows in ("one", "many")
    }
    assert [entry for entry in info["kernels"] if "bits" not in entry] == [
        {"op": "BitplaneGather", "kernel": "gather_rows"}
    ]


def test_instruction_set_can_be_limited(library: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    features = reports.info()["features"]
    if not features:
        pytest.skip("this processor has nothing to leave out")
    feeds, x = layer(30, 40, 4), activations(1, 40)
    for limit, kernel in ((features[0], "int8_4_one"), ("portable", "exact_4_one"), ("", "int8_4_one")):
        monkeypatch.setenv("PMPD_MAX_ISA", limit)
        assert reports.info()["features"] == {features[0]: features[:1], "portable": []}.get(limit, features)
        session = open_session(library, model(40), accuracy="int8", session="limited")
        session.run(None, {"X": x, **feeds})
        assert [node["kernel"] for node in reports.nodes("limited")] == [kernel]
        del session


def test_info_of_many_kernels_is_whole(tmp_path: Path) -> None:
    """As of a library with attention for 400 sizes of heads, 50 kB of text."""
    target = host_target()
    if target is None:
        pytest.skip("no target is for this machine")
    source = KERNELS.read_text(encoding="utf-8")
    rows = ", ".join(
        f'{{"attention_of_a_rather_long_name_{dim}", 0, {dim}, 1, 0, 0, 0}}' for dim in range(16, 6416, 16)
    )
    before = "const struct pmpd_attention pmpd_attentions[] = {{0}};\nconst size_t pmpd_attention_count = 0;"
    assert before in source
    array = f"const struct pmpd_attention pmpd_attentions[] = {{{rows}}};\nconst size_t pmpd_attention_count = 400;"
    many = tmp_path / "many.c"
    many.write_text(source.replace(before, array), encoding="utf-8")
    output = tmp_path / "libpmpd_ops.so"
    try:
        link_library(TARGETS[target], [many], output=output)
    except MissingExtraError as error:
        pytest.skip(f"needs a C compiler: {error}")
    kernels = Reports(output).info()["kernels"]
    assert [entry["dim"] for entry in kernels if "dim" in entry][::2] == list(range(16, 6416, 16))
