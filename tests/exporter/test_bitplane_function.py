"""The operator's ONNX function body, in ONNX Runtime and in onnx.reference, against the numpy layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pmpd.exporter.graph import operators as functions
from pmpd.runtime.format.bitplanes import bitplane_matmul, pack, row_stride, unpack

Feeds = dict[str, npt.NDArray[Any]]
TILE = 300  # weights: layers of a few hundred get several tiles


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "TILE_WEIGHTS", TILE)
        yield


def one_node(N: int, K: int, p: int, G: int, *, bias: bool, leading: int) -> onnx.ModelProto:
    """Return a model of one BitplaneMatMul whose X has `leading` axes before K."""
    axes = [f"axis{i}" for i in range(leading)]
    inputs = [
        helper.make_tensor_value_info("X", TensorProto.FLOAT, [*axes, K]),
        helper.make_tensor_value_info("planes", TensorProto.UINT8, [p, N, row_stride(K)]),
        helper.make_tensor_value_info("codebook", TensorProto.FLOAT16, [N, G, 2**p]),
    ]
    if bias:
        inputs.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [N]))
    names = [value.name for value in inputs] + [""] * (not bias)
    node = helper.make_node("BitplaneMatMul", names, ["Y"], domain="pmpd", K=K)
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [*axes, N])
    model = helper.make_model(
        helper.make_graph([node], "one_node", inputs, [output]),
        functions=[functions.bitplane_matmul()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("pmpd", 1)],
        ir_version=11,
    )
    onnx.checker.check_model(model)
    return model


def run_both(model: onnx.ModelProto, feeds: Feeds) -> list[npt.NDArray[np.float32]]:
    """Return Y of ONNX Runtime and of the reference evaluator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [session.run(None, feeds)[0], ReferenceEvaluator(model).run(None, feeds)[0]]


def random_layer(N: int, K: int, p: int, G: int, seed: int = 0) -> tuple[npt.NDArray[np.uint8], Feeds]:
    """Return codes and the inputs of the operator except X; the bias too."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**p, (N, K)).astype(np.uint8)
    return codes, {
        "planes": pack(codes, p),
        "codebook": rng.standard_normal((N, G, 2**p)).astype(np.float16),
        "bias": rng.standard_normal(N).astype(np.float32),
    }


@settings(max_examples=40)
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 90),
    p=st.integers(1, 8),
    G=st.integers(1, 12),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(N=3, K=513, p=2, G=1, leading=[1], bias=False, seed=0)  # more than one cache line; a row is more than a tile
@example(N=37, K=64, p=4, G=3, leading=[1, 5], bias=True, seed=0)  # the last tile overlaps the one before
@example(N=8, K=8, p=8, G=5, leading=[2], bias=True, seed=0)  # more groups than bytes in a row
def test_agrees_with_numpy(N: int, K: int, p: int, G: int, leading: list[int], bias: bool, seed: int) -> None:
    _, feeds = random_layer(N, K, p, G, seed)
    if not bias:
        del feeds["bias"]
    x = np.random.default_rng(seed + 1).standard_normal((*leading, K)).astype(np.float32)
    want = bitplane_matmul(x, feeds["planes"], feeds["codebook"], feeds.get("bias"))
    for y in run_both(one_node(N, K, p, G, bias=bias, leading=len(leading)), {"X": x, **feeds}):
        assert y.dtype == np.float32
        assert y.shape == (*leading, N)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("N", "K", "p", "G"), [(19, 37, 3, 1), (7, 70, 8, 1), (33, 21, 4, 2), (5, 9, 1, 3)])
def test_every_code_is_read_exactly(N: int, K: int, p: int, G: int) -> None:
    """A one-hot activation picks one column, so Y holds the very codebook values: equal, not close."""
    codes, feeds = random_layer(N, K, p, G)
    # Values that name their own place: code c of row n in group g is g * 2**p + c (exact in float16).
    feeds["codebook"] = np.tile(np.arange(G * 2**p, dtype=np.float16).reshape(1, G, 2**p), (N, 1, 1))
    del feeds["bias"]
    for y in run_both(one_node(N, K, p, G, bias=False, leading=1), {"X": np.eye(K, dtype=np.float32), **feeds}):
        assert np.array_equal(y.T.astype(np.uint16) % 2**p, codes)
        assert np.array_equal(y, bitplane_matmul(np.eye(K, dtype=np.float32), feeds["planes"], feeds["codebook"]))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_prefix_of_the_planes_is_the_lower_precision(p: int) -> None:
    N, K, P = 21, 43, 5
    codes, feeds = random_layer(N, K, P, 1)
    planes = feeds["planes"][:p]
    codebook = np.random.default_rng(p).standard_normal((N, 1, 2**p)).astype(np.float16)
    x = np.eye(K, dtype=np.float32)
    want = np.take_along_axis(codebook[:, 0].astype(np.float32), (codes >> (P - p)).astype(np.intp), axis=1).T
    assert np.array_equal(unpack(planes, K), codes >> (P - p))
    for y in run_both(one_node(N, K, p, 1, bias=False, leading=1), {"X": x, "planes": planes, "codebook": codebook}):
        assert np.array_equal(y, want)


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 7, 100])
def test_result_does_not_depend_on_the_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    N, K = 12, 16
    _, feeds = random_layer(N, K, 3, 2)
    monkeypatch.setattr(functions, "TILE_WEIGHTS", rows * K)
    x = np.eye(K, dtype=np.float32)
    want = bitplane_matmul(x, feeds["planes"], feeds["codebook"], feeds["bias"])
    for y in run_both(one_node(N, K, 3, 2, bias=True, leading=1), {"X": x, **feeds}):
        assert np.array_equal(y, want)


def test_padding_bits_do_not_count() -> None:
    N, K = 4, 13
    _, feeds = random_layer(N, K, 2, 1)
    x = np.random.default_rng(1).standard_normal((2, K)).astype(np.float32)
    dirty = {**feeds, "planes": feeds["planes"].copy()}
    dirty["planes"][:, :, 2:] = 0xFF
    dirty["planes"][:, :, 1] |= 0xE0
    model = one_node(N, K, 2, 1, bias=True, leading=1)
    for clean, other in zip(run_both(model, {"X": x, **feeds}), run_both(model, {"X": x, **dirty}), strict=True):
        assert np.array_equal(clean, other)


def test_the_default_tile_covers_a_whole_small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(functions, "TILE_WEIGHTS", 1 << 19)
    _, feeds = random_layer(300, 600, 4, 1)
    x = np.random.default_rng(1).standard_normal((1, 2, 600)).astype(np.float32)
    want = bitplane_matmul(x, feeds["planes"], feeds["codebook"], feeds["bias"])
    for y in run_both(one_node(300, 600, 4, 1, bias=True, leading=2), {"X": x, **feeds}):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)
