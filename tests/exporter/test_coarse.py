"""The bound of a coarse output layer: it holds for what kernels compute with, whatever the weights and the basis."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.exporter.bundle.coarse import LEVELS, basis_of, bounds, direction_groups, limits
from pmpd.exporter.quantize import AnyPrecision, NestedCodes
from pmpd.exporter.verify.coarse import coarse_ratio

Doubles = npt.NDArray[np.float64]


def weights(quantized: NestedCodes, P: int, p: int, levels: int | None) -> Doubles:
    """Return the weights ``[N, K]`` at p bits as kernels see them: 8-bit ones in equal steps of a row's range."""
    values = quantized.codebooks[p][:, 0].astype(np.float64)
    if levels is not None:
        low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
        step = np.maximum(high - low, 1e-30) / (levels - 1)
        values = low + step * np.floor((values - low) / step + 0.5)
    return np.take_along_axis(values, (quantized.codes >> (P - p)).astype(np.intp), axis=1)


def random_layer(rng: np.random.Generator, N: int, K: int, P: int, c: int) -> NestedCodes:
    weight = rng.standard_normal((N, K)) * np.exp(rng.standard_normal((N, 1)))
    return AnyPrecision(precisions=(P, c), parent=P, seed=c).quantize(weight.astype(np.float32))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    N=st.integers(1, 30),
    K=st.integers(1, 200),
    bits=st.sampled_from([(2, 1), (4, 3), (6, 4), (6, 3), (8, 4)]),
    directions=st.integers(1, 20),
    basis=st.sampled_from(["measured", "random", "zeros"]),
)
def test_no_logit_is_further_off_than_its_limit(
    seed: int, N: int, K: int, bits: tuple[int, int], directions: int, basis: str
) -> None:
    rng, (P, c), D = np.random.default_rng(seed), bits, min(directions, K)
    quantized = random_layer(rng, N, K, P, c)
    x = rng.standard_normal((20, K)) * np.exp(2 * rng.standard_normal(K))  # some channels are much larger
    chosen = {
        "measured": basis_of(x.astype(np.float32), D),
        "random": rng.standard_normal((D, K)).astype(np.float32),
        "zeros": np.zeros((D, K), np.float32),
    }[basis]
    # The activations that come nearest to the limits are the residuals themselves.
    residual = weights(quantized, P, P, None) - weights(quantized, P, c, None)
    x = np.concatenate([x, residual[:5], chosen[:5]])
    limit = limits(x, chosen, bounds(quantized, P, c, chosen))
    for levels in LEVELS:
        change = x @ (weights(quantized, P, P, levels) - weights(quantized, P, c, levels)).T
        assert (np.abs(change) <= limit).all()


def test_a_measured_basis_makes_the_bound_sharper() -> None:
    rng, K = np.random.default_rng(0), 128
    quantized = random_layer(rng, 200, K, 6, 4)
    x = rng.standard_normal((50, 3)) @ rng.standard_normal((3, K)) * 3 + rng.standard_normal((50, K))
    measured = basis_of(x[:25].astype(np.float32), 16)
    nothing = np.zeros((1, K), np.float32)  # the bound of Cauchy-Schwarz
    sharp, loose = (limits(x[25:], basis, bounds(quantized, 6, 4, basis)) for basis in (measured, nothing))
    assert sharp.mean() < 0.6 * loose.mean()


def test_a_basis_is_orthonormal_and_in_order_of_energy() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5, 40)) * 10.0 ** -np.arange(40)).astype(np.float32)
    basis = basis_of(np.concatenate([x, np.full((1, 40), np.nan, np.float32)]), 16)  # what is not finite is left out
    np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-6)
    energy = np.square(x @ basis.T).sum(axis=0)
    assert (np.diff(energy) <= 1e-6 * energy[0]).all()


@pytest.mark.parametrize(
    ("directions", "groups"),
    [(1, [(0, 1)]), (2, [(0, 1), (1, 2)]), (16, [(0, 1), (1, 4), (4, 16)]), (17, [(0, 1), (1, 4), (4, 16), (16, 17)])],
)
def test_groups_of_directions(directions: int, groups: list[tuple[int, int]]) -> None:
    assert direction_groups(directions) == [slice(*ends) for ends in groups]


def test_what_a_coarse_output_layer_may_give() -> None:
    want = np.array([[3.0, 1.0, 2.0]], np.float32)
    limit = np.array([[0.5, 0.5, 0.5]])

    def ratio(*y: float) -> float:
        return coarse_ratio(np.array([y], np.float32), want, limit)

    assert ratio(3, 1, 2) == 0
    assert ratio(3, 1.25, 2) == pytest.approx(0.5, rel=1e-3)
    assert ratio(3, 1.75, 2) > 1  # further off than its limit
    assert ratio(2.9, 1, 2) == np.inf  # the best is not finished
    assert ratio(3, 1, 2.9) == np.inf  # it can be the best, and is not finished
    assert ratio(3, 1, 3.1) == np.inf  # another one is the best
    assert ratio(3, np.nan, 2) == np.inf
