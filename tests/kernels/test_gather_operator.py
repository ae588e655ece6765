"""`BitplaneGather` of the operator library: rows of planes, bit for bit those of the numpy layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scalar_library import link

from pmpd.exporter.graph.operators import BITPLANE_GATHER, PMPD_DOMAIN, PMPD_VERSION, bitplane_gather
from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.format.bitplanes import dequantize, pack
from pmpd.runtime.format.manifest import Graph
from pmpd.tvm_kernels.library import link as link_module

Feeds = dict[str, npt.NDArray[Any]]

GRAPH = Graph(file="graph.onnx", phase="decode", precision=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return KernelLibrary(link(tmp_path_factory.mktemp("library") / "libpmpd_ops.so"), accuracy="exact")


def model(K: int, *, leading: int = 1, name: str = "model/embed_tokens/node") -> bytes:
    """Return a model of one BitplaneGather, function body included, that says nothing of its inputs' sizes."""
    shapes = {
        "ids": (TensorProto.INT64, leading),
        "planes": (TensorProto.UINT8, 3),
        "codebook": (TensorProto.FLOAT16, 3),
    }
    inputs = [helper.make_tensor_value_info(key, dtype, [None] * rank) for key, (dtype, rank) in shapes.items()]
    node = helper.make_node(BITPLANE_GATHER, list(shapes), ["Y"], name, domain=PMPD_DOMAIN, K=K)
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None] * (leading + 1))
    made = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        functions=[bitplane_gather()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(PMPD_DOMAIN, PMPD_VERSION)],
        ir_version=11,
    )
    return bytes(made.SerializeToString())


def open_session(library: KernelLibrary | None, model: bytes, *, threads: int = 1, tag: str = "") -> Any:
    """Open a session; without a library it runs the function body."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        library.register(options, tag=tag)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def table(N: int, K: int, p: int, G: int = 1, *, seed: int = 0) -> Feeds:
    """Return planes, and a codebook of any bits of float16: infinities, NaN and subnormal numbers too."""
    rng = np.random.default_rng(seed)
    return {
        "planes": pack(rng.integers(0, 2**p, (N, K)).astype(np.uint8), p),
        "codebook": rng.integers(0, 2**16, (N, G, 2**p)).astype(np.uint16).view(np.float16),
    }


def bits_of(y: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Return the bits of numbers; of NaN those of any."""
    return np.where(np.isnan(y), np.float32(np.nan), y).view(np.uint32)


def errors_of(library: KernelLibrary | None, seed: int = 0) -> int:
    """Return how many numbers of a table with groups and a last byte that is not full are wrong."""
    feeds, ids = table(50, 1100, 6, 3, seed=seed), np.random.default_rng(seed).integers(-50, 50, 40)
    want = dequantize(feeds["planes"], feeds["codebook"], 1100)[ids]
    y = open_session(library, model(1100)).run(None, {"ids": ids, **feeds})[0]
    return int((bits_of(y) != bits_of(want)).sum())


@settings(max_examples=60)
@given(
    N=st.integers(1, 60),
    K=st.integers(1, 600),
    p=st.integers(1, 8),
    G=st.integers(1, 12),
    leading=st.lists(st.integers(0, 4), max_size=3),
    threads=st.sampled_from([1, 2]),
)
@example(N=12, K=512, p=4, G=1, leading=[1, 1], threads=1)  # one whole line
@example(N=12, K=513, p=7, G=1, leading=[1, 1], threads=1)  # one more
@example(N=30, K=5000, p=3, G=2, leading=[1, 40], threads=2)  # several threads
@example(N=5, K=8, p=8, G=5, leading=[4], threads=1)  # more groups than bytes in a row
@example(N=5, K=20, p=8, G=1, leading=[2, 0, 3], threads=2)
@example(N=5, K=20, p=2, G=1, leading=[1] * 7, threads=1)
def test_agrees_with_numpy_and_the_function_body(
    library: KernelLibrary, N: int, K: int, p: int, G: int, leading: list[int], threads: int
) -> None:
    feeds, ids = table(N, K, p, G), np.random.default_rng(1).integers(-N, N, leading)
    graph = model(K, leading=len(leading))
    session = open_session(library, graph, threads=threads, tag="numpy")
    y = session.run(None, {"ids": ids, **feeds})[0]
    assert (y.dtype, y.shape) == (np.float32, (*leading, K))
    assert np.array_equal(bits_of(y), bits_of(dequantize(feeds["planes"], feeds["codebook"], K)[ids]))
    body = open_session(None, graph).run(None, {"ids": ids, **feeds})[0]
    assert np.array_equal(bits_of(y), bits_of(body))
    [node] = library.report("numpy", GRAPH)
    assert (node.op, node.bits, node.n, node.k, node.calls) == (BITPLANE_GATHER, p, N, K, 1)
    assert (node.kernel, node.slow) == ("gather_rows", False)


def test_float16_numbers_are_converted_exactly(library: KernelLibrary) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 1, 256)
    planes = pack(np.tile(np.arange(256, dtype=np.uint8), (256, 1)), 8)
    y = open_session(library, model(256)).run(None, {"ids": np.arange(256), "planes": planes, "codebook": every})[0]
    assert np.array_equal(bits_of(y), bits_of(every[:, 0].astype(np.float32)))


def test_padding_bits_do_not_count(library: KernelLibrary) -> None:
    feeds, ids = table(4, 13, 2), {"ids": np.arange(4)}
    dirty = feeds["planes"].copy()
    dirty[:, :, 2:] = 0xFF
    dirty[:, :, 1] |= 0xE0
    session = open_session(library, model(13))
    clean, other = (session.run(None, {**ids, **feeds, "planes": planes})[0] for planes in (feeds["planes"], dirty))
    assert np.array_equal(bits_of(clean), bits_of(other))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
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
    ],
)
def test_wrong_shapes_are_refused(library: KernelLibrary, name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = {"ids": np.arange(5), **table(5, 601, 3)}
    session = open_session(library, model(601, name="embedding"))
    session.run(None, feeds)
    with pytest.raises(Exception, match=r"BitplaneGather 'embedding': " + message):
        session.run(None, {**feeds, name: np.zeros(shape, feeds[name].dtype)})
    session.run(None, feeds)


@pytest.mark.parametrize("wrong", [5, -6, 2**62, -(2**63)])
def test_ids_out_of_range_fail(library: KernelLibrary, wrong: int) -> None:
    session = open_session(library, model(20))
    with pytest.raises(Exception, match=f"id {wrong} is out of range, there are 5 rows"):
        session.run(None, {"ids": np.array([0, wrong]), **table(5, 20, 3)})


def test_too_many_axes_are_refused(library: KernelLibrary) -> None:
    with pytest.raises(Exception, match=r"has shape \[1, 1, 1, 1, 1, 1, 1, 1\], wanted up to 7 axes"):
        open_session(library, model(20, leading=8)).run(None, {"ids": np.zeros([1] * 8, np.int64), **table(5, 20, 3)})


@pytest.mark.parametrize("K", [0, -1, 2**31])
def test_wrong_attributes_are_refused(library: KernelLibrary, K: int) -> None:
    with pytest.raises(Exception, match=f"attribute K is {K}, wanted a positive 32-bit number"):
        open_session(library, model(K))


MUTATIONS = {
    "the order of the planes": ("word = word << 1 | spread(", "word |= spread("),
    "a group's first byte": ("group_end += call->group_bytes;", "group_end += call->group_bytes + 1;"),
    "a row's codebooks": ("row * call->groups * levels", "row * levels"),
    "subnormal numbers": ("value *= 0x1p112f;", "if (half & 0x7c00u) value *= 0x1p112f;"),
    "the sign": ("word |= sign;", "word |= sign & 1;"),
    "infinities": ("if ((half & 0x7c00u) == 0x7c00u)", "if (0)"),
    "ids from the end": ("id < 0 ? id + call->n : id", "id < 0 ? -id : id"),
}


def test_the_mutated_check_passes_on_the_right_kernel(library: KernelLibrary) -> None:
    assert errors_of(library) == 0


@pytest.mark.full
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = MUTATIONS[mutation]
    shutil.copytree(link_module.SOURCES, tmp_path / "ort_ops")
    source = tmp_path / "ort_ops" / "gather.c"
    text = source.read_text(encoding="utf-8")
    assert text.count(before) == 1
    source.write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(link_module, "SOURCES", tmp_path / "ort_ops")
    wrong = KernelLibrary(link(tmp_path / "libpmpd_ops.so"), accuracy="exact")
    assert errors_of(wrong) > 0
