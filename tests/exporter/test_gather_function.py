"""`BitplaneGather`'s ONNX function body, in ONNX Runtime and in onnx.reference, against the numpy layout."""

from __future__ import annotations

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

from pmpd.exporter.graph.operators import bitplane_gather
from pmpd.runtime.format.bitplanes import dequantize, pack

Feeds = dict[str, npt.NDArray[Any]]


def one_node(K: int, *, leading: int = 1) -> onnx.ModelProto:
    """Return a model of one BitplaneGather that says nothing of its inputs' sizes."""
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, [None] * leading),
        helper.make_tensor_value_info("planes", TensorProto.UINT8, [None] * 3),
        helper.make_tensor_value_info("codebook", TensorProto.FLOAT16, [None] * 3),
    ]
    node = helper.make_node("BitplaneGather", ["ids", "planes", "codebook"], ["Y"], domain="pmpd", K=K)
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None] * (leading + 1))
    model = helper.make_model(
        helper.make_graph([node], "one_node", inputs, [output]),
        functions=[bitplane_gather()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("pmpd", 1)],
        ir_version=11,
    )
    onnx.checker.check_model(model)
    return model


def session_of(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def table(N: int, K: int, p: int, G: int, *, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    return {
        "planes": pack(rng.integers(0, 2**p, (N, K)).astype(np.uint8), p),
        "codebook": rng.standard_normal((N, G, 2**p)).astype(np.float16),
    }


@settings(max_examples=40)
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 90),
    p=st.integers(1, 8),
    G=st.integers(1, 12),
    leading=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 1000),
)
@example(N=3, K=513, p=2, G=1, leading=[1], seed=0)  # more than one cache line
@example(N=8, K=8, p=8, G=5, leading=[2], seed=0)  # more groups than bytes in a row
@example(N=8, K=20, p=6, G=1, leading=[], seed=0)  # one id, no axis
@example(N=8, K=20, p=6, G=1, leading=[2, 0], seed=0)
def test_agrees_with_numpy(N: int, K: int, p: int, G: int, leading: list[int], seed: int) -> None:
    feeds = table(N, K, p, G, seed=seed)
    ids = np.random.default_rng(seed + 1).integers(-N, N, leading)
    want = dequantize(feeds["planes"], feeds["codebook"], K)[ids]
    model = one_node(K, leading=len(leading))
    for y in (
        session_of(model).run(None, {"ids": ids, **feeds})[0],
        ReferenceEvaluator(model).run(None, {"ids": ids, **feeds})[0],
    ):
        assert y.dtype == np.float32
        assert y.shape == (*leading, K)
        assert np.array_equal(y, want)


@pytest.mark.parametrize("wrong", [5, -6, 2**62])
def test_ids_out_of_range_fail(wrong: int) -> None:
    session = session_of(one_node(20))
    with pytest.raises(Exception, match=r"indices element out of data bounds"):
        session.run(None, {"ids": np.array([0, wrong]), **table(5, 20, 3, 1)})


def test_padding_bits_do_not_count() -> None:
    feeds, ids = table(4, 13, 2, 1), {"ids": np.arange(4)}
    dirty = feeds["planes"].copy()
    dirty[:, :, 2:] = 0xFF
    dirty[:, :, 1] |= 0xE0
    session = session_of(one_node(13))
    clean, other = (session.run(None, {**ids, **feeds, "planes": planes})[0] for planes in (feeds["planes"], dirty))
    assert np.array_equal(clean, other)
