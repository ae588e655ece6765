"""The operator library around the kernels, with scalar kernels in C in place of TVM's: no TVM is needed here."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
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

from pmpd.exporter.functions import bitplane_matmul as function_body
from pmpd.runtime.bitplanes import bitplane_matmul, pack
from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.tvm_kernels import library as library_module
from pmpd.tvm_kernels.library import build_library, link_library
from pmpd.tvm_kernels.targets import TARGETS, host_target

Feeds = dict[str, npt.NDArray[Any]]

# Kernels as kernels.h wants them, in plain C, of which each gives NaN if what it was promised does not hold. There is
# an exact one per precision, for one row of activations and for many, except: 7 bits have none for one row, 8 bits
# have none at all. int8 kernels are exact ones under another name: at 3 bits for many rows only, at 4 bits for one,
# first one that needs what no machine of the architecture has, then one that needs what most have.
KERNELS = r"""
#include "kernels.h"

enum { ROWS = 4, CHUNK = 12, SCRATCH = 100, SCRATCH_PER_LINE = 28 };

const char pmpd_any_name[] = "any_scalar";
__attribute__((visibility("default"))) int stray(void) { return 1; }

static float from_half(uint16_t half) {
  const float sign = half >> 15 ? -1.0f : 1.0f, fraction = (float)(half & 1023);
  const int exponent = half >> 10 & 31;
  float power = 0x1p-24f;
  for (int i = 1; i < exponent; i++) power *= 2;
  return sign * power * (exponent ? 1024 + fraction : fraction);
}

static float weight(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, int32_t bits, int32_t groups,
                    int32_t group_bytes, int32_t lines, int32_t n, int32_t column) {
  int32_t code = 0;
  for (int32_t i = 0; i < bits; i++)
    code = code << 1 | (planes[i * plane_bytes + (int64_t)n * lines * 64 + column / 8] >> (column % 8) & 1);
  return from_half(codebook[(((int64_t)n * groups + column / 8 / group_bytes) << bits) + code]);
}

void pmpd_any(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const float *x, float *y,
              int64_t ldy, int32_t bits, int32_t groups, int32_t group_bytes, int32_t k, int32_t lines, int32_t m,
              int32_t begin, int32_t end) {
  for (int32_t i = 0; i < m; i++)
    for (int32_t n = begin; n < end; n++) {
      double sum = 0;
      for (int32_t column = 0; column < k; column++)
        sum += (double)x[(int64_t)i * k + column] *
               weight(planes, plane_bytes, codebook, bits, groups, group_bytes, lines, n, column);
      y[i * ldy + n] = (float)sum;
    }
}

/* Columns in reverse. */
static void reverse(const float *x, void *packed, float *scale, float *sum, int32_t k, int32_t lines, int32_t begin,
                    int32_t end) {
  const int32_t columns = 512 * lines;
  for (int32_t i = begin; i < end; i++) {
    float *row = (float *)packed + (int64_t)i * columns;
    for (int32_t column = 0; column < columns; column++)
      row[columns - 1 - column] = column < k ? x[(int64_t)i * k + column] : 0;
    for (int32_t part = 0; part < 16 * lines; part++) scale[(int64_t)i * 16 * lines + part] = (float)(i + part);
    sum[i] = (float)i;
  }
}

static void multiply(int32_t bits, const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook,
                     const void *packed, const float *scale, const float *sum, float *y, int64_t ldy, uint8_t *scratch,
                     int32_t lines, int32_t m, int32_t begin, int32_t end) {
  const int32_t columns = 512 * lines, bytes = SCRATCH + SCRATCH_PER_LINE * lines;
  int promised = begin % ROWS == 0 && end - begin <= CHUNK && begin < end && (uintptr_t)scratch % 64 == 0 &&
                 (uintptr_t)packed % 64 == 0;
  for (int32_t i = 0; i < bytes; i++) scratch[i] = (uint8_t)(begin + i);
  for (int32_t i = 0; i < m; i++) {
    const float *row = (const float *)packed + (int64_t)i * columns, *scales = scale + (int64_t)i * 16 * lines;
    promised &= sum[i] == (float)i && scales[0] == (float)i && scales[16 * lines - 1] == (float)(i + 16 * lines - 1);
    for (int32_t n = begin; n < end; n++) {
      double total = 0;
      for (int32_t column = 0; column < columns; column++)
        total += (double)row[columns - 1 - column] *
                 weight(planes, plane_bytes, codebook, bits, 1, columns, lines, n, column);
      y[i * ldy + n] = (float)total;
    }
  }
  for (int32_t i = 0; i < bytes; i++) promised &= scratch[i] == (uint8_t)(begin + i);
  if (!promised) y[begin] = 0.0f / 0.0f;
}

#define MULTIPLY(p)                                                                                                \
  static void multiply_##p(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const void *packed, \
                           const float *scale, const float *sum, float *y, int64_t ldy, uint8_t *scratch,          \
                           int32_t lines, int32_t m, int32_t begin, int32_t end) {                                 \
    multiply(p, planes, plane_bytes, codebook, packed, scale, sum, y, ldy, scratch, lines, m, begin, end);         \
  }
#define KERNEL(name, features, p, accuracy, many) \
  {name, features, p, accuracy, many, 4, ROWS, CHUNK, SCRATCH, SCRATCH_PER_LINE, reverse, multiply_##p}
#define EXACT(p) KERNEL("exact_" #p "_one", 0, p, PMPD_EXACT, 0), KERNEL("exact_" #p "_many", 0, p, PMPD_EXACT, 1)

MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5) MULTIPLY(6) MULTIPLY(7)

#ifdef __x86_64__
enum { OTHERS = PMPD_DOTPROD, COMMON = PMPD_AVX2 };
#else
enum { OTHERS = PMPD_AVX2, COMMON = PMPD_NEON };
#endif

const struct pmpd_kernel pmpd_kernels[] = {
    KERNEL("int8_4_one_others", OTHERS, 4, PMPD_INT8, 0),
    KERNEL("int8_4_one", COMMON, 4, PMPD_INT8, 0),
    KERNEL("int8_3_many", 0, 3, PMPD_INT8, 1),
    EXACT(1), EXACT(2), EXACT(3), EXACT(4), EXACT(5), EXACT(6),
    KERNEL("exact_7_many", 0, 7, PMPD_EXACT, 1),
};
const size_t pmpd_kernel_count = sizeof pmpd_kernels / sizeof *pmpd_kernels;
"""


def expected_kernel(p: int, G: int, M: int, accuracy: str, *, common: bool = True) -> str:
    """Return the kernel of those above that is the right one on a machine that has, or has not, the common feature."""
    rows = "one" if M <= 1 else "many"
    if G > 1 or p == 8:
        return "any_scalar"
    if accuracy == "int8" and (p == 3 or (p == 4 and rows == "one" and common)):
        return f"int8_{p}_{'many' if p == 3 else 'one'}"
    return f"exact_{p}_{'many' if p == 7 else rows}"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("kernels") / "kernels.c"
    source.write_text(KERNELS, encoding="utf-8")
    return source


@pytest.fixture(scope="module")
def library(kernels: Path) -> Path:
    """The operator library of this machine, with the kernels above."""
    target = host_target()
    if target is None:
        pytest.skip("no target is for this machine")
    output = kernels.with_name("libpmpd_ops.so")
    return link(target, kernels, output)


def link(target: str, kernels: Path, output: Path) -> Path:
    try:
        link_library(TARGETS[target], [kernels], output=output)
    except MissingExtraError as error:
        pytest.skip(f"needs a C compiler: {error}")
    return output


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


def model(
    K: int, *, bias: bool = False, leading: int = 1, name: str = "node", x: int = TensorProto.FLOAT, **attributes: Any
) -> bytes:
    """Return a model of one BitplaneMatMul, function body included, that says nothing of its inputs' sizes."""
    shapes = {"X": (x, leading + 1), "planes": (TensorProto.UINT8, 3), "codebook": (TensorProto.FLOAT16, 3)}
    if bias:
        shapes["bias"] = TensorProto.FLOAT, 1
    inputs = [helper.make_tensor_value_info(key, dtype, [None] * rank) for key, (dtype, rank) in shapes.items()]
    names = [*shapes, *([""] * (not bias))]
    node = helper.make_node("BitplaneMatMul", names, ["Y"], name, domain="pmpd", **{"K": K, **attributes})
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None] * (leading + 1))
    made: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        functions=[function_body()],
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("pmpd", 1)],
        ir_version=10,
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
        {"name": name, "bits": 0, "n": 0, "k": 20, "kernel": None, "calls": 0, "nanoseconds": 0}
    ]
    for _ in range(3):
        session.run(None, {"X": activations(1, 20), **layer(7, 20, 4)})
    [node] = reports.nodes("counted")
    assert node["calls"] == 3
    assert node["nanoseconds"] > 0
    reports.functions.pmpd_ops_reset(b"another")
    assert reports.nodes("counted") == [node]
    reports.functions.pmpd_ops_reset(b"counted")
    assert reports.nodes("counted") == [{**node, "calls": 0, "nanoseconds": 0}]


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
    assert {(entry["bits"], entry["accuracy"], entry["rows"]): entry["kernel"] for entry in info["kernels"]} == {
        (p, accuracy, rows): expected_kernel(p, 1, 1 if rows == "one" else 2, accuracy, common=common)
        for p in range(1, 9)
        for accuracy in ("exact", "int8")
        for rows in ("one", "many")
    }


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


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_library_shows_and_needs_little(kernels: Path, tmp_path: Path, target: str) -> None:
    built = link(target, kernels, tmp_path / target / "libpmpd_ops.so")
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("needs nm and readelf, of binutils")
    symbols = output_of("nm", "-D", "--defined-only", built).split()[2::3]
    assert set(symbols) == {"RegisterCustomOps", "pmpd_ops_info", "pmpd_ops_report", "pmpd_ops_reset"}
    dynamic = output_of("readelf", "-d", built)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    machine = {"x86_64": "X86-64", "aarch64": "AArch64"}[TARGETS[target].arch]
    assert machine in output_of("readelf", "-h", built)


def test_library_is_compiled_for_the_least_processor(library: Path) -> None:
    if TARGETS[str(host_target())].arch != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs an x86-64 machine, and objdump of binutils")
    code = output_of("objdump", "-d", "--no-show-raw-insn", library)
    assert "%xmm0" in code
    # Neither wide registers nor the three operands of AVX.
    assert "%ymm" not in code
    assert "%zmm" not in code
    assert not [line for line in code.splitlines() if "\tv" in line]


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Runs on its own, without a C library: another architecture's is seldom at hand.
DRIVER = r"""
#include <stddef.h>

#include "cpu.h"
#include "dispatch.h"

#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
enum { WRITE = 1, EXIT = 231 };
static long ask(long number, long a, long b, long c) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}
#else
__asm__(".globl _start\n_start:\n mov x0, sp\n bl run\n");
enum { WRITE = 64, EXIT = 94 };
static long ask(long number, long a, long b, long c) {
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
  return x0;
}
#endif

static long *stack;

char *getenv(const char *name) { return (void)name, NULL; }

int strcmp(const char *a, const char *b) {
  for (; *a && *a == *b; a++, b++) continue;
  return *a - *b;
}

unsigned long getauxval(unsigned long key) {
  long *at = stack + 1 + stack[0] + 1; /* past the arguments */
  while (*at++) continue;              /* past the environment */
  for (; at[0]; at += 2)
    if ((unsigned long)at[0] == key) return (unsigned long)at[1];
  return 0;
}

static void say(const char *text) {
  size_t length = 0;
  while (text[length]) length++;
  ask(WRITE, 1, (long)text, (long)length);
}

enum { N = 12, K = 600, LINES = 2, P = 4 };
static uint8_t planes[P * N * 64 * LINES];
static uint16_t codebook[N << P];
static float x[K], scale[16 * LINES], sum[1], found[N], wanted[N];
static _Alignas(64) float packed[512 * LINES];
static _Alignas(64) uint8_t scratch[1024];

void run(long *start) {
  stack = start;
  const uint32_t features = pmpd_features(pmpd_highest_level());
  for (int i = 0; i < pmpd_level_count; i++)
    if (pmpd_levels[i].feature & features) say(pmpd_levels[i].name), say(" ");
  for (size_t i = 0; i < sizeof planes; i++) planes[i] = i % (64 * LINES) < K / 8 ? (uint8_t)(i * 37 >> 2) : 0;
  for (int i = 0; i < N << P; i++) codebook[i] = (uint16_t)(0x3000 + i * 77);
  for (int i = 0; i < K; i++) x[i] = (float)(i % 7 - 3);
  pmpd_any(planes, N * 64 * LINES, codebook, x, wanted, N, P, 1, K / 8, K, LINES, 1, 0, N);
  const struct pmpd_kernel *kernel = pmpd_choose(features).kernels[PMPD_INT8][0][P - 1];
  kernel->pack(x, packed, scale, sum, K, LINES, 0, 1);
  kernel->matmul(planes, N * 64 * LINES, codebook, packed, scale, sum, found, N, scratch, LINES, 1, 0, N);
  int agree = 1;
  for (int i = 0; i < N; i++) agree &= found[i] == wanted[i] && found[i] != 0;
  say(kernel->name);
  say(agree ? " agrees" : " differs");
  ask(EXIT, 0, 0, 0);
  for (;;) continue;
}
"""


@pytest.mark.parametrize(
    ("arch", "processor", "said"),
    [
        ("aarch64", "cortex-a53", "neon int8_4_one agrees"),
        ("aarch64", "neoverse-n1", "neon dotprod int8_4_one agrees"),
        ("x86_64", "Nehalem", "exact_4_one agrees"),
        ("x86_64", "Haswell", "avx2 int8_4_one agrees"),
    ],
)
def test_other_processors(kernels: Path, tmp_path: Path, arch: str, processor: str, said: str) -> None:
    emulator = shutil.which(f"qemu-{arch}")
    if not emulator:
        pytest.skip(f"needs qemu-{arch}, of Debian's qemu-user")
    pytest.importorskip("ziglang", reason="needs a cross compiler: the package ziglang")
    (tmp_path / "driver.c").write_text(DRIVER, encoding="utf-8")
    sources = [tmp_path / "driver.c", kernels, *(library_module.SOURCES / name for name in ("cpu.c", "dispatch.c"))]
    target = f"-target {arch}-linux-gnu.2.17 -mcpu=baseline -O2 -Wall -Wextra -Werror -fno-builtin".split()
    zig = [sys.executable, "-m", "ziglang", "cc", *target]
    for source in sources:
        output_of(*zig, f"-I{library_module.SOURCES}", "-c", source, "-o", tmp_path / f"{source.stem}.o")
    output_of(*zig, "-nostdlib", "-static", *sorted(tmp_path.glob("*.o")), "-o", tmp_path / "driver")
    assert output_of(emulator, "-cpu", processor, tmp_path / "driver") == said


def test_unknown_target() -> None:
    with pytest.raises(PmpdError, match="unknown target 'x86-64-v5': choose one of x86-64-v4, x86-64-v3, aarch64"):
        build_library("x86-64-v5", precisions=[4], output=Path("libpmpd_ops.so"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library_module.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(library_module.shutil, "which", lambda _name: None)
    for target in TARGETS:
        with pytest.raises(MissingExtraError, match="ziglang is not installed"):
            build_library(target, precisions=[4], output=tmp_path / "libpmpd_ops.so")


def test_compiler_of_the_system(library: Path, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zig the host's own compiler links for the host, and only for it."""
    if not shutil.which("cc"):
        pytest.skip("needs cc")
    monkeypatch.setattr(library_module.importlib.util, "find_spec", lambda _name: None)
    output = link(str(host_target()), kernels, tmp_path / "libpmpd_ops.so")
    feeds, x = layer(30, 40, 4), activations(2, 40)
    y = open_session(output, model(40), threads=2).run(None, {"X": x, **feeds})[0]
    np.testing.assert_allclose(y, reference(x, feeds), rtol=1e-5, atol=1e-5)
    other = next(target for target in TARGETS.values() if target.arch != TARGETS[str(host_target())].arch)
    with pytest.raises(MissingExtraError, match="ziglang is not installed"):
        link_library(other, [kernels], output=tmp_path / "other.so")


@pytest.mark.parametrize(
    ("source", "reason"), [("int pmpd_any(;", "error: "), ("int unfinished;", "undefined (symbol|reference)")]
)
def test_failed_link_says_why_and_leaves_the_old_file(library: Path, tmp_path: Path, source: str, reason: str) -> None:
    broken, output = tmp_path / "kernels.c", tmp_path / "libpmpd_ops.so"
    broken.write_text(source, encoding="utf-8")
    output.write_bytes(b"old")
    with pytest.raises(PmpdError, match=rf"cannot link {output}: .*{reason}") as caught:
        link_library(TARGETS[str(host_target())], [broken], output=output)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [broken, output]


def test_unwritable_output(library: Path, kernels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PmpdError, match=r"cannot write .* choose another place"):
        link_library(TARGETS[str(host_target())], [kernels], output=tmp_path / "file" / "libpmpd_ops.so")
