"""The nested weight layout: pack, unpack, prefixes and dequantization against loops."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pmpd.runtime.format.bitplanes import bitplane_matmul, dequantize, group_size, pack, row_stride, unpack

Codes = npt.NDArray[np.uint8]


@st.composite
def codes_and_precision(draw: st.DrawFn) -> tuple[Codes, int]:
    P = draw(st.integers(1, 8))
    shape = draw(st.tuples(st.integers(1, 7), st.one_of(st.integers(1, 40), st.integers(500, 530))))
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**P - 1))), P


@given(codes_and_precision())
def test_unpack_inverts_pack(drawn: tuple[Codes, int]) -> None:
    codes, P = drawn
    assert np.array_equal(unpack(pack(codes, P), codes.shape[1]), codes)


@given(codes_and_precision())
def test_first_planes_are_the_lower_precision_model(drawn: tuple[Codes, int]) -> None:
    codes, P = drawn
    planes = pack(codes, P)
    for p in range(1, P + 1):
        top = np.right_shift(codes, P - p, dtype=np.uint8)
        assert np.array_equal(unpack(planes[:p], codes.shape[1]), top)
        assert np.array_equal(planes[:p], pack(top, p))  # the very bytes, not only their meaning
        assert planes.tobytes().startswith(pack(top, p).tobytes())


@given(codes_and_precision())
def test_layout_bit_by_bit(drawn: tuple[Codes, int]) -> None:
    codes, P = drawn
    N, K = codes.shape
    planes = pack(codes, P)
    assert planes.dtype == np.uint8
    assert planes.shape == (P, N, row_stride(K))
    bits = np.unpackbits(planes, axis=2, bitorder="little")
    for n, k in {(0, 0), (N - 1, K - 1), (N // 2, K // 3)}:
        value = int(codes[n, k])
        assert [int(bit) for bit in bits[:, n, k]] == [value >> (P - 1 - i) & 1 for i in range(P)]
        assert [int(planes[i, n, k // 8]) >> k % 8 & 1 for i in range(P)] == [int(bit) for bit in bits[:, n, k]]
    assert not bits[:, :, K:].any()  # padding is zero


@pytest.mark.parametrize(
    ("columns", "stride"), [(1, 64), (8, 64), (511, 64), (512, 64), (513, 128), (1024, 128), (2049, 320)]
)
def test_row_stride_is_whole_cache_lines(columns: int, stride: int) -> None:
    assert row_stride(columns) == stride


@given(st.integers(1, 5000), st.integers(1, 200))
def test_groups_cover_all_columns_in_whole_bytes(columns: int, groups: int) -> None:
    size = group_size(columns, groups)
    assert size % 8 == 0
    assert size * groups >= columns
    assert (size - 8) * groups < columns  # the smallest such size


@given(codes_and_precision(), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_dequantize_is_a_lookup_per_element(drawn: tuple[Codes, int], G: int, seed: int) -> None:
    codes, P = drawn
    N, K = codes.shape
    codebook = np.random.default_rng(seed).standard_normal((N, G, 2**P)).astype(np.float16)
    want = np.empty((N, K), dtype=np.float32)
    for n in range(N):
        for k in range(K):
            want[n, k] = codebook[n, k // group_size(K, G), codes[n, k]]
    got = dequantize(pack(codes, P), codebook, K)
    assert got.dtype == np.float32
    assert np.array_equal(got, want)


def test_matmul_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (5, 19)).astype(np.uint8)
    codebook = rng.standard_normal((5, 2, 8)).astype(np.float16)
    bias = rng.standard_normal(5).astype(np.float32)
    x = rng.standard_normal((2, 3, 19)).astype(np.float32)
    y = bitplane_matmul(x, pack(codes, 3), codebook, bias)
    assert y.shape == (2, 3, 5)
    assert y.dtype == np.float32
    for b, m, n in np.ndindex(y.shape):
        row = [float(codebook[n, k // group_size(19, 2), codes[n, k]]) for k in range(19)]
        assert y[b, m, n] == pytest.approx(float(np.dot(x[b, m].astype(float), row)) + float(bias[n]), abs=1e-5)
    without = bitplane_matmul(x, pack(codes, 3), codebook)
    np.testing.assert_allclose(without + bias, y, atol=1e-6)


@pytest.mark.parametrize("precision", [0, -1, 9])
def test_precision_out_of_range(precision: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 8 bits, got {precision}"):
        pack(np.zeros((1, 8), dtype=np.uint8), precision)


def test_code_too_large_for_the_precision() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(np.array([[0, 8]], dtype=np.uint8), 3)
