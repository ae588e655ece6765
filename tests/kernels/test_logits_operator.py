"""`BitplaneLogits` of the operator library: what must be exact is, bit for bit, and the rest is within its limit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scalar_library import link

from pmpd.exporter.bundle.coarse import basis_of, bounds, limits
from pmpd.exporter.graph.logits import BITPLANE_LOGITS, bitplane_logits
from pmpd.exporter.graph.operators import bitplane_matmul as matmul_function
from pmpd.exporter.quantize import AnyPrecision
from pmpd.exporter.verify.coarse import coarse_ratio
from pmpd.exporter.verify.rounding import round_activations
from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.runtime.format.bitplanes import bitplane_matmul, pack
from pmpd.runtime.format.manifest import Graph
from pmpd.tvm_kernels.library import link as link_module
from pmpd.tvm_kernels.library.link import build_library
from pmpd.tvm_kernels.targets import host_target

Floats = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[Any]]

GRAPH = Graph(file="graph.onnx", phase="decode", precision=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return KernelLibrary(link(tmp_path_factory.mktemp("library") / "libpmpd_ops.so"), accuracy="exact")


@dataclass(frozen=True)
class Layer:
    """An output layer and activations ``[T, K]`` that look for some of its rows."""

    feeds: Feeds
    x: Floats

    @classmethod
    def random(
        cls, N: int, K: int, P: int, c: int, *, directions: int = 16, bias: bool = False, seed: int = 0
    ) -> Layer:
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((N, K)).astype(np.float32)
        common = rng.standard_normal(K)
        x = weight[rng.integers(0, N, 6)] + rng.standard_normal((6, K)) * 0.3 + 2 * rng.standard_normal((6, 1)) * common
        quantized = AnyPrecision(precisions=(P, c), parent=P, seed=c).quantize(weight)
        basis = basis_of(x.astype(np.float32), min(directions, K))
        feeds: Feeds = {
            "planes": pack(quantized.codes, P),
            "codebook": quantized.codebooks[P],
            "coarse_codebook": quantized.codebooks[c],
            "basis": basis,
            "bound": bounds(quantized, P, c, basis),
        }
        if bias:
            feeds["bias"] = rng.standard_normal(N).astype(np.float32)
        return cls(feeds, x.astype(np.float32))

    def limits(self, accuracy: str) -> npt.NDArray[np.float64]:
        x = self.x.astype(np.float64)
        x = round_activations(x).values if accuracy == "int8" else x
        return limits(x, self.feeds["basis"], self.feeds["bound"])


def model(layer: Layer) -> bytes:
    """Return a model of one node that says nothing of its inputs' sizes."""
    names = ["X", "planes", "codebook", "coarse_codebook", "basis", "bound", "margin", "bias"][
        : 7 + ("bias" in layer.feeds)
    ]
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    types = dict(zip(names, [single, TensorProto.UINT8, half, half, single, half, single, single], strict=False))
    ranks = dict(zip(names, [2, 3, 3, 3, 2, 2, 1, 1], strict=False))
    inputs = [helper.make_tensor_value_info(name, types[name], [None] * ranks[name]) for name in names]
    node = helper.make_node(BITPLANE_LOGITS, names, ["Y"], "head/node", domain="pmpd", K=layer.x.shape[1])
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, None])
    made = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        functions=[matmul_function(), bitplane_logits()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("pmpd", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


class Session:
    """The node under a library, or as its function body."""

    def __init__(self, layer: Layer, library: KernelLibrary | None, *, threads: int = 2) -> None:
        self.layer, self.library = layer, library
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if library is not None:
            library.register(options, tag="logits")
            library.reset("logits")
        self.session = onnxruntime.InferenceSession(model(layer), options, providers=["CPUExecutionProvider"])

    def run(self, x: Floats, margin: float, changes: Feeds | None = None) -> Floats:
        feeds = {**self.layer.feeds, "X": x, "margin": np.array([margin], np.float32), **(changes or {})}
        y: Floats = self.session.run(None, feeds)[0]
        return y

    def each(self, margin: float) -> Floats:
        """Return the logits of all activations, one row at a time."""
        return np.concatenate([self.run(row[None], margin) for row in self.layer.x])

    @property
    def finished(self) -> float:
        assert self.library is not None
        [node] = [node for node in self.library.report("logits", GRAPH) if node.calls]
        assert node.finished is not None
        return node.finished


def check(layer: Layer, library: KernelLibrary, margin: float = 0.0, *, threads: int = 2) -> float:
    """Hold the operator to its contract; return the share of rows that it finished."""
    session = Session(layer, library, threads=threads)
    whole = session.each(np.inf)
    assert session.finished == 1
    library.reset("logits")
    y = session.each(margin)
    assert coarse_ratio(y, whole, layer.limits(library.accuracy)) <= 1
    near = whole >= whole.max(axis=1, keepdims=True) - margin
    np.testing.assert_array_equal(y[near], whole[near])
    return session.finished


@settings(max_examples=30)
@given(
    N=st.integers(1, 90),
    K=st.integers(1, 600),
    bits=st.sampled_from([(2, 1), (4, 2), (4, 3), (6, 4), (5, 3), (8, 4)]),
    directions=st.integers(1, 20),
    margin=st.sampled_from([0.0, 3.0, 100.0, -1.0]),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_agrees_with_the_whole_product(
    library: KernelLibrary,
    N: int,
    K: int,
    bits: tuple[int, int],
    directions: int,
    margin: float,
    bias: bool,
    threads: int,
) -> None:
    layer = Layer.random(N, K, *bits, directions=directions, bias=bias)
    share = check(layer, library, margin, threads=threads)
    assert 0 < share <= 1
    y = Session(layer, library).run(layer.x, 0.0)  # several rows: all is finished
    feeds = layer.feeds
    want = bitplane_matmul(layer.x, feeds["planes"], feeds["codebook"], feeds.get("bias"))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_finishes_few_rows_and_more_within_a_margin(library: KernelLibrary) -> None:
    layer = Layer.random(3000, 300, 6, 4)
    few, more = check(layer, library), check(layer, library, 200.0)
    assert few < 0.02
    assert few < more < 1
    assert check(layer, library, 1e9) == 1


def test_the_function_body_is_the_whole_product(library: KernelLibrary) -> None:
    layer = Layer.random(50, 70, 4, 2, bias=True)
    y = [Session(layer, kernels).run(layer.x[:1], margin) for kernels, margin in ((None, 0.0), (library, np.inf))]
    np.testing.assert_allclose(y[0], y[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_show(library: KernelLibrary, value: float) -> None:
    layer = Layer.random(200, 100, 6, 4)
    layer.x[0, 5] = value
    session = Session(layer, library)
    assert not np.isfinite(session.run(layer.x[:1], 0.0)).any()
    assert session.finished == 1


def test_a_margin_that_is_no_number_asks_for_everything(library: KernelLibrary) -> None:
    session = Session(Layer.random(100, 64, 6, 4), library)
    session.run(session.layer.x[:1], np.nan)
    assert session.finished == 1


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "coarse_codebook",
            (40, 1, 64),
            r"has shape \[40, 1, 64\], wanted \[40, 1, 2\^c\] with c below 6",
        ),
        ("coarse_codebook", (39, 1, 16), "coarse_codebook has shape"),
        ("coarse_codebook", (40, 1, 12), "coarse_codebook has shape"),
        ("basis", (16, 99), r"basis has shape \[16, 99\], wanted \[directions, 100\]"),
        ("bound", (5, 40), r"bound has shape \[5, 40\], wanted \[4, 40\] for 16 directions"),
        ("bound", (4, 39), "bound has shape"),
        ("margin", (2,), "margin has shape"),
    ],
)
def test_wrong_shapes_are_refused(library: KernelLibrary, name: str, shape: tuple[int, ...], message: str) -> None:
    layer = Layer.random(40, 100, 6, 4)
    dtype = np.float32 if name == "margin" else layer.feeds[name].dtype
    with pytest.raises(Exception, match=message):
        Session(layer, library).run(layer.x[:1], 0.0, {name: np.zeros(shape, dtype)})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if (matters && first < 0) first = tile;", "if (matters && first < 0 && tile % 8) first = tile;"),
        ("upper[i] += reach * from_half(bound[i]);", "upper[i] += 0.01f * reach * from_half(bound[i]);"),
        ("const int32_t last = matters ? stop : tile;", "const int32_t last = tile;"),
        ("(result > best.lower ? result : best.lower)", "(result > best.lower ? 2 * result : best.lower)"),
    ],
    ids=["dropped tile", "limits too small", "last tile forgotten", "threshold too high"],
)
@pytest.mark.full
def test_a_wrong_search_is_found(
    before: str, after: str, library: KernelLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer.random(500, 64, 6, 2)
    check(layer, library)
    shutil.copytree(link_module.SOURCES, tmp_path / "ort_ops")
    source = tmp_path / "ort_ops" / "logits.c"
    text = source.read_text(encoding="utf-8")
    assert text.count(before) == 1
    source.write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(link_module, "SOURCES", tmp_path / "ort_ops")
    wrong = KernelLibrary(link(tmp_path / "libpmpd_ops.so"), accuracy="exact")
    with pytest.raises(AssertionError):
        check(layer, wrong)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of this machine with its real kernels."""
    pytest.importorskip("tvm")
    target = host_target()
    if target is None:
        pytest.skip("no target is for this machine")
    output = tmp_path_factory.mktemp("compiled") / "libpmpd_ops.so"
    try:
        build_library(target, precisions=[3, 4, 6], output=output)
    except MissingExtraError as error:
        pytest.skip(f"needs a C compiler: {error}")
    return output


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", ["exact", "int8"])
@pytest.mark.parametrize("level", ["", "neon", "avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize(("N", "K", "P", "c"), [(2003, 896, 6, 4), (777, 100, 6, 3), (640, 1152, 4, 3)])
def test_compiled_kernels(
    compiled: Path, level: str, accuracy: str, N: int, K: int, P: int, c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level:
        monkeypatch.setenv("PMPD_MAX_ISA", level)
    try:
        library = KernelLibrary(compiled, accuracy=accuracy)
    except PmpdError as error:
        pytest.skip(str(error))
    layer = Layer.random(N, K, P, c, directions=64, bias=N % 2 == 1)
    assert check(layer, library) < 0.5
    check(layer, library, 30.0, threads=1)
