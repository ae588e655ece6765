"""The operator GroupQueryAttention through ONNX Runtime, with compiled kernels and as the function body."""

from __future__ import annotations

import ctypes
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from attention_cases import Case, Result, check, random_case
from onnx import TensorProto, helper

from pmpd.exporter.graph.operators import (
    GROUP_QUERY_ATTENTION,
    PMPD_DOMAIN,
    PMPD_VERSION,
    group_query_attention,
    limited_group_query_attention,
)
from pmpd.tvm_kernels.library.link import build_library, link_library
from pmpd.tvm_kernels.targets import find_target, host_target

pytest.importorskip("tvm")
pytest.importorskip("ziglang")


H, G, D, C, PAIRS = 8, 2, 64, 96, 16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's operator library, with attention for heads of 64 and 80."""
    target = host_target()
    if target is None:
        pytest.skip("no target is for this machine")
    output = tmp_path_factory.mktemp("library") / "libpmpd_ops.so"
    build_library(target, precisions=(), head_dims=(64, 80), output=output)
    return output


def model(*, heads: int = H, kv_heads: int = G, name: str = "node", **limits: Any) -> bytes:
    """Return a model of one GroupQueryAttention, function body included, that says nothing of its inputs' sizes.

    `limits` are the attributes of the definition that has windows and softcaps.
    """
    ranks = {
        "qkv": (TensorProto.FLOAT, 3),
        "past_key": (TensorProto.FLOAT16, 4),
        "past_value": (TensorProto.FLOAT16, 4),
        "last_position": (TensorProto.INT32, 1),
        "total": (TensorProto.INT32, 0),
        "cos": (TensorProto.FLOAT, 2),
        "sin": (TensorProto.FLOAT, 2),
    }
    outputs = {"Y": (TensorProto.FLOAT, 3), "present_key": ranks["past_key"], "present_value": ranks["past_key"]}
    values = [
        [helper.make_tensor_value_info(key, dtype, [None] * rank) for key, (dtype, rank) in part.items()]
        for part in (ranks, outputs)
    ]
    node = helper.make_node(
        GROUP_QUERY_ATTENTION,
        [*ranks],
        [*outputs],
        name,
        domain=PMPD_DOMAIN,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=D**-0.5,
        **limits,
    )
    made = helper.make_model(
        helper.make_graph([node], "graph", *values),
        functions=[limited_group_query_attention() if limits else group_query_attention()],
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid(PMPD_DOMAIN, PMPD_VERSION),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=11,
    )
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def open_session(library: Path | None, model: bytes, *, threads: int = 2, optimized: bool = True) -> Any:
    """Open a session whose reports have its number of threads as tag; with no library it runs the function body."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("pmpd.session", f"attention {threads}")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds_of(case: Case) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of the operator."""
    return {
        "qkv": case.qkv[None],
        "past_key": case.keys[None],
        "past_value": case.values[None],
        "last_position": np.array([case.past + len(case.qkv) - 1], np.int32),
        "total": np.array(case.keys.shape[1], np.int32),
        "cos": case.cos,
        "sin": case.sin,
    }


def call(session: Any, case: Case, *, in_place: bool = True) -> Result:
    """Run a case with one buffer, or separate ones, for past and present."""
    binding = session.io_binding()
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in feeds_of(case).items()}
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name, buffer)
    binding.bind_output("Y")
    for past, present in (("past_key", "present_key"), ("past_value", "present_value")):
        if not in_place:  # inputs stay in `buffers`: ONNX Runtime before 1.24 does not keep their memory alive
            buffers[present] = onnxruntime.OrtValue.ortvalue_from_numpy(np.full_like(case.keys[None], np.inf))
        binding.bind_ortvalue_output(present, buffers[past if in_place else present])
    session.run_with_iobinding(binding)
    y, keys, values = (value.numpy()[0].copy() for value in binding.get_outputs())  # numpy's are views
    return Result(y.reshape(len(case.qkv), case.heads, case.dim), keys, values)


def op_case(M: int, past: int, *, heads: int = H, kv_heads: int = G, seed: int = 0) -> Case:
    case = random_case(D, heads, kv_heads, M, past, PAIRS, seed=seed)
    return replace(case, scale=float(np.float32(D**-0.5)))


@pytest.fixture
def reports(library: Path) -> Any:
    functions = ctypes.CDLL(str(library))
    functions.pmpd_ops_info.restype = ctypes.c_char_p
    functions.pmpd_ops_report.restype = ctypes.c_size_t
    functions.pmpd_ops_report.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    return functions


@pytest.mark.parametrize(
    ("limit", "heads", "kv_heads"), [("", H, G), ("avx2", H, G), ("portable", H, G), ("", 9, 3), ("", 9, 1), ("", 5, 5)]
)
def test_operator_agrees_with_numpy(
    library: Path, limit: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers with one thread and two, however the work is shared: 9 heads over 1 are split among threads."""
    if limit == "avx2" and platform.machine() != "x86_64":
        pytest.skip("is a level of x86_64")
    monkeypatch.setenv("PMPD_MAX_ISA", limit)
    graph = model(heads=heads, kv_heads=kv_heads)
    sessions = [open_session(library, graph, threads=threads) for threads in (1, 2)]
    for M, past in ((1, 0), (1, 77), (5, 3), (33, 0), (20, 40)):
        case = op_case(M, past, heads=heads, kv_heads=kv_heads)
        bound, *others = [call(session, case, in_place=place) for session in sessions for place in (True, False)]
        check(case, bound)
        for other in others:
            for made, want in zip(vars(other).values(), vars(bound).values(), strict=True):
                np.testing.assert_array_equal(made, want)


def test_outputs_that_nobody_bound(library: Path) -> None:
    case = op_case(3, 20)
    y, keys, values = open_session(library, model()).run(None, feeds_of(case))
    check(case, Result(y.reshape(3, H, D), keys[0], values[0]))
    np.testing.assert_array_equal(keys[0, :, 23:], case.keys[:, 23:])


def test_nothing_new_leaves_all_as_it_was(library: Path) -> None:
    result = call(open_session(library, model()), op_case(0, 20), in_place=False)
    assert result.y.shape == (0, H, D)
    np.testing.assert_array_equal(result.keys, op_case(0, 20).keys)


def test_tokens_one_by_one_are_as_good_as_together(library: Path) -> None:
    session, case = open_session(library, model()), op_case(12, 5)
    whole = call(session, case)
    keys, values, step = case.keys, case.values, []
    for i in range(12):
        result = call(session, replace(case, qkv=case.qkv[i : i + 1], keys=keys, values=values, past=5 + i))
        keys, values = result.keys, result.values
        step.append(result.y)
    np.testing.assert_array_equal(keys, whole.keys)
    np.testing.assert_array_equal(values, whole.values)
    np.testing.assert_allclose(np.concatenate(step), whole.y, atol=1e-5)


@pytest.mark.parametrize("optimized", [True, False])
def test_function_body_agrees_with_the_kernel(library: Path, optimized: bool) -> None:
    """Off by a few roundings to float16 (2^-11) of numbers up to 4: the body rounds queries, scores and y."""
    compiled, body = open_session(library, model()), open_session(None, model(), optimized=optimized)
    for M, past in ((1, 0), (1, 77), (33, 0), (20, 40)):
        case = op_case(M, past)
        want = call(compiled, case)
        for in_place in (True, False):
            result = call(body, case, in_place=in_place)
            np.testing.assert_allclose(result.y, want.y, atol=2**-8)
            # Keys are rotated by rounded tables, in float16.
            new = slice(None), slice(0, past + M)
            np.testing.assert_allclose(result.keys[new], want.keys[new], atol=2**-7)
            np.testing.assert_array_equal(result.values[new], want.values[new])


LIMITS = [
    {"window": 7},
    {"window": 1},
    {"window": 500},
    {"softcap": 2.0},
    {"window": 20, "softcap": 2.0},
    {"window": 0},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(H, G), (9, 1)])
def test_windows_and_softcaps_in_the_kernel_and_in_the_body(
    library: Path, limits: dict[str, Any], heads: int, kv_heads: int
) -> None:
    graph = model(heads=heads, kv_heads=kv_heads, **limits)
    compiled, body = open_session(library, graph), open_session(None, graph)
    for M, past in ((1, 0), (1, 77), (5, 3), (33, 0), (20, 40)):
        case = replace(op_case(M, past, heads=heads, kv_heads=kv_heads), **limits)
        want = call(compiled, case)
        check(case, want)
        result = call(body, case)
        np.testing.assert_allclose(result.y, want.y, atol=2**-8)  # as without limits
        np.testing.assert_array_equal(result.values[:, : past + M], want.values[:, : past + M])


def test_a_model_may_have_nodes_with_and_without_limits(library: Path) -> None:
    """Under the definition with limits, a node without attributes is one of the other definition."""
    made = onnx.load_from_string(model())
    made.functions[0].CopyFrom(limited_group_query_attention())
    case = op_case(20, 40)
    for kernels in (library, None):
        want, got = (call(open_session(kernels, graph), case) for graph in (model(), made.SerializeToString()))
        np.testing.assert_allclose(got.y, want.y, atol=0 if kernels else 2**-8)


def test_a_body_with_a_window_lets_the_cache_grow(library: Path) -> None:
    """Without kernels, past and present may have different lengths: the window follows the mask's."""
    case = replace(op_case(1, 12), window=5)
    feeds = feeds_of(case)
    past = {name: feeds[name][:, :, :12] for name in ("past_key", "past_value")}
    session = open_session(None, model(window=5))
    y, keys, values = session.run(None, {**feeds, **past, "total": np.array(13, np.int32)})
    assert keys.shape == (1, G, 13, D)
    check(case, call(open_session(library, model(window=5)), case))
    want = call(open_session(library, model(window=5)), case)
    np.testing.assert_allclose(y.reshape(1, H, D), want.y, atol=2**-8)
    np.testing.assert_array_equal(values[0], want.values[:, :13])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"window": -1}, "attribute window is -1, wanted 0 or more"),
        ({"softcap": -2.0}, "attribute softcap is -2, wanted 0 or more"),
        ({"softcap": float("nan")}, "attribute softcap is -?nan, wanted 0 or more"),
    ],
)
def test_limits_that_the_operator_refuses(library: Path, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(library, model(**limits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past_key": (2, G, C, D)}, r"input past_key has shape \[2, 2, 96, 64\], wanted \[1, 2, capacity, a mult"),
        ({"past_key": (1, G + 1, C, D)}, r"input past_key has shape \[1, 3, 96, 64\], wanted \[1, 2, "),
        ({"past_key": (1, G, C, 72)}, r"input past_key has shape \[1, 2, 96, 72\], wanted \[1, 2, capacity, a mult"),
        ({"past_key": (1, G, C, 0)}, r"input past_key has shape \[1, 2, 96, 0\], wanted"),
        ({"past_value": (1, G, C - 1, D)}, r"input past_value has shape \[1, 2, 95, 64\], wanted \[1, 2, 96, 64\], as"),
        ({"qkv": (2, 1, 768)}, r"input qkv has shape \[2, 1, 768\], wanted \[1, tokens, 768\] for 8 \+ 2 \* 2 heads"),
        ({"qkv": (1, 1, 700)}, r"input qkv has shape \[1, 1, 700\], wanted \[1, tokens, 768\] for 8 \+ 2 \* 2 heads"),
        ({"last_position": (2,)}, r"input last_position has shape \[2\], wanted \[1\]"),
        ({"cos": (C, 12)}, r"input cos has shape \[96, 12\], wanted \[positions, a multiple of 8 up to 32\]"),
        ({"cos": (C, 40)}, r"input cos has shape \[96, 40\], wanted \[positions, a multiple of 8 up to 32\]"),
        ({"sin": (C, 8)}, r"input sin has shape \[96, 8\], wanted \[96, 16\], as cos"),
        ({"last_position": -1}, "last_position is -1, less than 1 new tokens take"),
        ({"last_position": C}, "96 positions and 1 new ones, more than the capacity of the cache, 96"),
        (
            {"cos": (50, PAIRS), "sin": (50, PAIRS), "last_position": 50},
            "50 positions and 1 new ones, more than the rows",
        ),
        (
            {"past_key": (1, G, C, 48), "past_value": (1, G, C, 48), "qkv": (1, 1, 576)},
            "no kernel for heads of 48 elements, this library has those for 64, 80: export the model again, or run it",
        ),
    ],
)
def test_what_the_operator_refuses(library: Path, changes: dict[str, Any], message: str) -> None:
    case = random_case(D, H, G, 1, C - 4, PAIRS)
    session, feeds = open_session(library, model(name="layers.0")), feeds_of(case)
    session.run(None, feeds)
    made = {
        name: np.zeros(value, feeds[name].dtype) if isinstance(value, tuple) else np.array([value], feeds[name].dtype)
        for name, value in changes.items()
    }
    with pytest.raises(Exception, match=rf"GroupQueryAttention 'layers\.0': {message}"):
        session.run(None, {**feeds, **made})
    session.run(None, feeds)


@pytest.mark.parametrize(("heads", "kv_heads"), [(0, 1), (4, 0), (4, -2), (2, 4), (5, 2), (2**40, 1)])
def test_attributes_that_the_operator_refuses(library: Path, heads: int, kv_heads: int) -> None:
    message = f"attributes num_heads {heads} and kv_num_heads {kv_heads}, wanted positive numbers"
    with pytest.raises(Exception, match=message):
        open_session(library, model(heads=heads, kv_heads=kv_heads))


@pytest.mark.full
def test_a_library_without_attention_says_so(tmp_path: Path) -> None:
    output = tmp_path / "libpmpd_ops.so"
    link_library(find_target(host_target() or ""), [Path(__file__).with_name("scalar_kernels.c")], output=output)
    with pytest.raises(Exception, match="no kernel for heads of 64 elements, this library has those for none: export"):
        call(open_session(output, model()), op_case(1, 0))


def test_report_says_what_ran(library: Path, reports: Any) -> None:
    info = json.loads(reports.pmpd_ops_info())["kernels"]
    choice = {(k["dim"], k["rows"]): k["kernel"] for k in info if k["op"] == GROUP_QUERY_ATTENTION}
    assert choice.keys() == {(dim, rows) for dim in (64, 80) for rows in ("one", "many")}
    # A token's four queries of a key are many; where no two heads share a key there is one.
    for heads, M, rows in ((H, 1, "many"), (G, 1, "one"), (G, 8, "many")):
        session = open_session(library, model(heads=heads, name=f"{heads} {M}"))
        case = random_case(D, heads, G, M, 4, PAIRS)
        call(session, case)
        call(session, case)
        buffer = ctypes.create_string_buffer(4096)
        assert reports.pmpd_ops_report(b"attention 2", buffer, len(buffer)) < len(buffer)
        [node] = [node for node in json.loads(buffer.value) if node["name"] == f"{heads} {M}"]
        assert node.pop("nanoseconds") > 0
        kernel = choice[D, rows]
        assert node == {
            "name": f"{heads} {M}",
            "op": GROUP_QUERY_ATTENTION,
            "bits": 16,
            "n": heads * D,
            "k": D,
            "kernel": kernel,
            "calls": 2,
            "finished": 0,
        }
