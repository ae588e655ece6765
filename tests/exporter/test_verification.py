"""The measures of the verification: what is rounding, what is an error, and what is no evidence."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pmpd.exporter.verify.agreement import Check, Distance, Figure, compare, require_passed
from pmpd.exporter.verify.noise import product_errors
from pmpd.exporter.verify.probe import ExposedGraph
from pmpd.exporter.verify.rounding import (
    int8_product_bound,
    moved,
    product_bound,
    round_activations,
    round_codebook,
)
from pmpd.runtime import Bundle
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.sessions import GraphRunner, LoadedGraph, StepBuffers, open_session
from pmpd.runtime.errors import PmpdError

Floats = npt.NDArray[np.float32]


def some_logits(positions: int = 8, vocabulary: int = 50) -> Floats:
    return np.random.default_rng(5).normal(size=(positions, vocabulary)).astype(np.float32) * 4


def noisy(logits: Floats, size: float) -> Floats:
    noise = np.random.default_rng(6).normal(size=logits.shape)
    return (logits + size * noise).astype(np.float32)


def test_equal_logits_are_at_no_distance_and_a_common_offset_is_none() -> None:
    logits = some_logits()
    for other in (logits, logits + np.float32(3)):
        distance = Distance.of(other, logits)
        assert distance.kl < 1e-12
        assert distance.angle < 1e-12
        assert (distance.same_token, distance.positions) == (8, 8)


def test_distances_grow_with_the_square_of_an_error() -> None:
    logits = some_logits()
    near, far = (Distance.of(noisy(logits, size), logits) for size in (0.001, 0.01))
    assert far.kl / near.kl == pytest.approx(100, rel=0.1)
    assert far.angle / near.angle == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("size", "passed"), [(0.01, True), (0.02, True), (0.05, False), (0.5, False)])
def test_an_error_of_a_few_times_the_floor_passes_and_more_does_not(size: float, passed: bool) -> None:
    logits = some_logits()
    floor = Distance.of(noisy(logits, 0.01), logits)
    assert compare("x", noisy(logits, size), logits, floor=floor).passed == passed


def test_one_wrong_position_is_not_averaged_away() -> None:
    logits = some_logits(32)
    floor = Distance.of(noisy(logits, 0.01), logits)
    wrong = logits.copy()
    wrong[31] = noisy(logits, 0.1)[31]
    assert not compare("x", wrong, logits, floor=floor).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    logits = some_logits()
    wrong = logits.copy()
    wrong[3, 4] = bad
    floor = Distance.of(noisy(logits, 0.01), logits)
    assert not compare("x", wrong, logits, floor=floor).passed
    assert not compare("x", logits, wrong, floor=floor).passed
    assert not Figure(math.nan, 1.0).passed


def test_constant_logits_are_no_evidence() -> None:
    """They have no direction: their cosine counts as 0, not as 1."""
    logits, constant = some_logits(), np.zeros((8, 50), np.float32)
    floor = Distance.of(noisy(logits, 0.01), logits)
    assert not compare("x", constant, logits, floor=floor).passed
    assert not compare("x", constant, constant, floor=floor).passed


def test_counts_are_counts() -> None:
    logits = some_logits(32)
    floor = Distance.of(noisy(logits, 0.01), logits)
    other = logits.copy()
    other[0] = -other[0]
    assert "same most likely token at 31 of 32 positions" in str(compare("x", other, logits, floor=floor))


def test_a_failed_check_says_what_was_measured_and_allowed_and_what_to_do() -> None:
    check = Check(name="nodes of x", figures={"error": Figure(3.0, 1.0)}, note="largest at layers.3.mlp")
    with pytest.raises(PmpdError) as failure:
        require_passed(check)
    for part in ("nodes of x", "error 3 (allowed 1)", "layers.3.mlp", "nothing was published", "--no-verify"):
        assert part in str(failure.value)
    assert "\n" not in str(failure.value)


def layer(N: int, K: int, *, outlier: float = 1.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(K)
    x, weight = rng.normal(size=(4, K)), rng.normal(size=(N, K))
    x[:, 7] *= outlier
    return x.astype(np.float32).astype(np.float64), weight.astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("K", [64, 576, 5632])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_float32_products_are_within_the_bound_and_one_wrong_sign_is_not(K: int, outlier: float) -> None:
    x, weight = layer(16, K, outlier=outlier)
    exact = x @ weight.T
    bound = product_bound(K, np.linalg.norm(x, axis=1), np.linalg.norm(weight, axis=1), exact)
    in_order = np.zeros((4, 16), np.float32)
    for k in range(K):  # the worst order of additions
        in_order += x[:, k, None].astype(np.float32) * weight[:, k].astype(np.float32)
    assert (np.abs(in_order - exact) <= bound).all()
    k = int(np.argmin(np.abs(np.abs(x[0]) - 1) + np.abs(np.abs(weight[0]) - 1)))  # neither large nor small
    assert abs(2 * x[0, k] * weight[0, k]) > bound[0, 0]


@pytest.mark.parametrize("levels", [128, 256])
def test_8_bit_products_are_those_of_the_rounded_numbers(levels: int) -> None:
    K, rng = 320, np.random.default_rng(11)
    codebook = np.sort(rng.normal(size=(16, 1, 16)).astype(np.float16), axis=2)
    codes = rng.integers(0, 16, (16, K))
    x = rng.normal(size=(4, K))
    rounded, table = round_activations(x), round_codebook(codebook, levels)
    values = table.values[:, 0]
    low, high = codebook[:, 0].min(1, keepdims=True), codebook[:, 0].max(1, keepdims=True)
    step = (high.astype(np.float64) - low) / (levels - 1)
    assert np.abs(values - codebook[:, 0]).max() <= step.max() / 2 * 1.001
    assert np.abs(rounded.values - x).max() <= np.abs(x).max() / 127 / 2 * 1.001
    weight = np.take_along_axis(values, codes, axis=1)
    exact = rounded.values @ weight.T
    bound = int8_product_bound(K, rounded, table, exact)
    assert (np.abs(exact.astype(np.float32) - exact) <= bound).all()
    unrounded = x @ np.take_along_axis(codebook[:, 0].astype(np.float64), codes, axis=1).T
    # 8 bits are not taken for float32, nor the other way, save in rows with a codebook entry between two steps.
    assert (np.abs(unrounded - exact) > bound).mean() > 0.8
    wrong = exact - 2 * rounded.values[:, 5, None] * weight[:, 5]
    assert (np.abs(wrong - exact) > bound).mean() > 0.7


def test_numbers_between_two_steps_may_go_either_way() -> None:
    x = np.zeros((1, 32))
    x[0, :2] = 127.0, 10.5
    assert round_activations(x).ties == pytest.approx(1.0)
    x[0, 1] = 10.4
    assert round_activations(x).ties == 0


def test_noise_has_the_size_asked_for_and_is_always_the_same() -> None:
    weights = {"a": np.full(10_000, 2.0, np.float32), "b": np.full((3, 5), -1.0, np.float32)}
    once, again = moved(weights, 1e-3), moved(weights, 1e-3)
    assert np.sqrt(np.mean(np.square(once["a"] / 2 - 1))) == pytest.approx(1e-3, rel=0.05)
    assert once["b"].dtype == np.float32
    for name in weights:
        np.testing.assert_array_equal(once[name], again[name])


def test_errors_of_products_have_the_size_of_each_position_and_are_always_the_same() -> None:
    sizes = {"y": np.array([0.0, 0.5, 2.0])}
    once, again = (product_errors(sizes, {"y": 20_000})["y"] for _ in range(2))
    assert (once.shape, once.dtype) == ((3, 20_000), np.float32)
    np.testing.assert_allclose(np.sqrt(np.square(once).mean(axis=1)), sizes["y"], rtol=0.02)
    np.testing.assert_array_equal(once, again)


@pytest.mark.full
def test_noise_inputs_leave_the_graph_as_it_was_until_they_are_fed(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))  # a file is written beside the weights
    graph = bundle.manifest.graph("decode", 4)
    ids = [5, 6, 7, 8]
    with ExposedGraph(bundle, graph) as exposed:
        probe = exposed.open()
        calm = probe.run([ids])
        attention = {name: np.full((1, 4, width), 1.5, np.float32) for name, width in exposed.widths.items()}
        products = {name: np.ones((1, 1, 1), np.float32) for name in exposed.errors.values()}
        moved_runs = [probe.run([ids], noisy=noisy) for noisy in (attention, products)]
    assert not list(bundle.path.glob(".probe-*"))
    session = open_session(bundle, graph, threads=1)
    cache = KvCache(bundle.manifest.kv_cache, len(ids))
    cache.extend(len(ids))
    plain = GraphRunner(
        LoadedGraph(graph, bundle.path / graph.file, session, ""),
        cache,
        StepBuffers(bundle.manifest.architecture.vocab_size),
    ).run(ids)
    np.testing.assert_allclose(calm.logits, plain, rtol=1e-5, atol=1e-5)
    layers = bundle.manifest.kv_cache.layers
    assert (len(exposed.widths), len(exposed.errors)) == (layers, 4 * layers)  # the output layer's are the logits
    for run in moved_runs:
        assert np.abs(run.logits - plain).max() > 1e-3
