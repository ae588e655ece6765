"""The nested quantizer against brute force and its contract, and the sensitivities against plain autograd."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pmpd.exporter.calibrate.fisher import squared_gradients
from pmpd.exporter.quantize import AnyPrecision, Method, NestedCodes, anyprecision, tiles
from pmpd.exporter.quantize.kmeans import GRID
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import dequantize, group_size, pack

Array = npt.NDArray[Any]

VALUES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape).clip(-1e3, 1e3),
    "two bumps": lambda rng, shape: rng.standard_normal(shape) + 6 * (rng.random(shape) < 0.2),
    "few distinct": lambda rng, shape: rng.choice([-1.5, -0.0, 0.0, 0.25, 0.75, 2.0], shape),
    "far from zero": lambda rng, shape: 1000 + rng.random(shape),
    "tiny": lambda rng, shape: 1e-6 * rng.standard_normal(shape),
    "rows apart": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, (shape[0], 1)),
    "constant": lambda rng, shape: np.full(shape, -0.3),
    "zero": lambda rng, shape: np.zeros(shape),
}
SENSITIVITIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array | None]] = {
    "none": lambda rng, shape: None,
    "chi squared": lambda rng, shape: rng.standard_normal(shape) ** 2,
    "steep": lambda rng, shape: 1e-9 * np.exp(3 * rng.standard_normal(shape)),
    "mostly zero": lambda rng, shape: rng.random(shape) * (rng.random(shape) < 0.1),
    "zero": lambda rng, shape: np.zeros(shape),
}


def sample(values: str, sensitivity: str, shape: tuple[int, int], seed: int = 0) -> tuple[Array, Array | None]:
    rng = np.random.default_rng(seed)
    weight = VALUES[values](rng, shape).astype(np.float32)
    importance = SENSITIVITIES[sensitivity](rng, shape)
    return weight, None if importance is None else importance.astype(np.float32)


def fisher(importance: npt.NDArray[np.floating] | None) -> dict[str, npt.NDArray[np.floating]]:
    """Return an importance as the statistics that the method takes."""
    return {} if importance is None else {"fisher": importance}


def weights_of(sensitivity: Array | None, shape: tuple[int, ...]) -> Array:
    """Return what each error of one row and group counts, in float64."""
    if sensitivity is None:
        return np.ones(shape)
    mean = sensitivity.astype(np.float64).mean()
    return sensitivity / (mean if mean > 0 else 1.0) + anyprecision.SENSITIVITY_FLOOR


def spread(x: Array, w: Array) -> float:
    """Return the weighted squared error of one cluster about its mean."""
    return float((w * (x - (w * x).sum() / w.sum()) ** 2).sum()) if len(x) else 0.0


def clustering_error(x: Array, w: Array, codes: Array) -> float:
    return sum(spread(x[codes == c], w[codes == c]) for c in np.unique(codes))


def least_error(x: Array, w: Array, clusters: int) -> float:
    """Return the least weighted squared error of any clustering, by dynamic programming over all boundaries."""
    order = np.argsort(x)
    x, w = (x - x.mean())[order], w[order]
    mass, total, square = (np.concatenate([[0.0], np.cumsum(w * x**i)]) for i in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        run = (square[None] - square[:, None]) - (total[None] - total[:, None]) ** 2 / (mass[None] - mass[:, None])
    run[np.tri(len(run), k=-1, dtype=bool)] = np.inf
    np.fill_diagonal(run, 0.0)
    best = run[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + run).min(axis=0)
    return max(float(best[-1]), 0.0)


@given(
    values=st.sampled_from(sorted(VALUES)),
    sensitivity=st.sampled_from(sorted(SENSITIVITIES)),
    N=st.integers(1, 4),
    K=st.integers(1, 200),
    groups=st.integers(1, 5),
    bits=st.integers(1, 6).flatmap(lambda parent: st.tuples(st.just(parent), st.integers(1, parent))),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_any_matrix_keeps_the_contract(
    values: str, sensitivity: str, N: int, K: int, groups: int, bits: tuple[int, int], seed: int
) -> None:
    parent, seed_precision = bits
    precisions = tuple(range(parent, 0, -1))
    weight, importance = sample(values, sensitivity, (N, K), seed)
    quantizer = AnyPrecision(precisions=precisions, parent=parent, seed=seed_precision, groups=groups)
    nested = quantizer.quantize(weight, fisher(importance))
    again = quantizer.quantize(weight, fisher(importance))
    assert (nested.codes == again.codes).all()
    assert nested.codes.max() < 2**parent
    planes = pack(nested.codes, parent)
    size = group_size(K, groups)
    for p in precisions:
        codebook = nested.codebooks[p]
        assert codebook.shape == (N, groups, 2**p)
        assert np.isfinite(codebook).all()
        assert (np.diff(codebook.astype(np.float32), axis=2) >= 0).all()
        assert (codebook == again.codebooks[p]).all()
        restored = dequantize(planes[:p], codebook, K)
        for n, k in np.ndindex(N, -(-K // size)):
            columns = np.s_[n, k * size : (k + 1) * size]
            x = weight[columns].astype(np.float64)
            w = weights_of(None if importance is None else importance[columns], x.shape)
            codes = nested.codes[columns] >> (parent - p)
            order = np.argsort(x)
            rises = np.diff(codes[order].astype(int))
            assert (rises >= 0).all(), "codes ascend with the values"
            assert (rises[np.diff(x[order]) == 0] == 0).all(), "equal values have one code"
            for code in np.unique(codes):
                mine = codes == code
                mean = (w[mine] * x[mine]).sum() / w[mine].sum()
                assert restored[columns][mine] == pytest.approx(mean, rel=2.0**-10, abs=2.0**-24)


@pytest.mark.parametrize("sensitivity", ["none", "chi squared", "mostly zero"])
@pytest.mark.parametrize("values", sorted(VALUES))
def test_error_falls_with_every_bit(values: str, sensitivity: str) -> None:
    weight, importance = sample(values, sensitivity, (8, 300))
    nested = AnyPrecision(precisions=(1, 2, 3, 4, 5), parent=5).quantize(weight, fisher(importance))
    errors = []
    for p, codebook in nested.codebooks.items():
        residual = weight - dequantize(pack(nested.codes, 5)[:p], codebook, 300).astype(np.float64)
        errors.append(sum((weights_of(importance, weight.shape) * residual**2).sum(axis=1)))
    rounding = (2.0**-11 * np.abs(weight) + 2.0**-24).max() ** 2 * weight.size  # of the codebooks to float16
    assert all(finer <= coarser + rounding for coarser, finer in pairwise(errors)), errors
    if values in ("normal", "heavy tails", "two bumps"):
        assert all(finer < 0.7 * coarser for coarser, finer in pairwise(errors)), errors


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("sensitivity", ["none", "chi squared", "steep"])
@pytest.mark.parametrize("values", sorted(VALUES.keys() - {"constant", "zero"}))
@pytest.mark.parametrize(("K", "excess"), [(11, 1e-6), (GRID, 1e-6), (500, 0.01)])
def test_seed_clusters_are_nearly_optimal(values: str, sensitivity: str, seed: int, K: int, excess: float) -> None:
    """Rows as long as the search grid are clustered exactly, longer ones to one per cent."""
    weight, importance = sample(values, sensitivity, (6, K))
    codes = AnyPrecision(precisions=(seed,), parent=seed, seed=seed).quantize(weight, fisher(importance)).codes
    error = least = 0.0
    for n, row in enumerate(weight.astype(np.float64)):
        w = weights_of(None if importance is None else importance[n], row.shape)
        scale = spread(row, w)  # so that every row counts
        error += clustering_error(row, w, codes[n]) / scale
        least += least_error(row, w, 2**seed) / scale
    assert error <= least * (1 + excess) + 1e-9


@pytest.mark.parametrize("sensitivity", ["none", "chi squared", "steep", "mostly zero"])
@pytest.mark.parametrize("values", sorted(VALUES))
def test_every_split_is_the_best_one(values: str, sensitivity: str) -> None:
    weight, importance = sample(values, sensitivity, (5, 90))
    codes = AnyPrecision(parent=4, seed=2).quantize(weight, fisher(importance)).codes
    for n, row in enumerate(weight.astype(np.float64)):
        w = weights_of(None if importance is None else importance[n], row.shape)
        for p in (3, 4):
            child = codes[n] >> (4 - p)
            for code in np.unique(child >> 1):
                mine = child >> 1 == code
                best = least_error(row[mine], w[mine], 2)
                slack = 1e-9 * spread(row[mine], w[mine]) + 1e-14 * (w[mine] * row[mine] ** 2).sum()
                assert clustering_error(row[mine], w[mine], child[mine]) <= best + slack


def test_precisions_below_the_seed_merge_neighbours() -> None:
    weight, importance = sample("normal", "chi squared", (3, 64))
    nested = AnyPrecision(precisions=(3, 1), parent=3, seed=3).quantize(weight, fisher(importance))
    assert (
        nested.codes == AnyPrecision(precisions=(3,), parent=3, seed=3).quantize(weight, fisher(importance)).codes
    ).all()
    assert importance is not None
    lower = nested.codes[0] < 4
    mean = np.average(weight[0, lower], weights=importance[0, lower])
    assert nested.codebooks[1][0, 0, 0] == pytest.approx(mean, rel=1e-3)


def test_rows_and_tiles_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = sample("normal", "chi squared", (37, 130))
    assert importance is not None
    quantizer = AnyPrecision(groups=2)
    whole = quantizer.quantize(weight, fisher(importance))
    rows = [17, 3, 30]
    some = quantizer.quantize(weight[rows], fisher(importance[rows]))
    assert (some.codes == whole.codes[rows]).all()
    assert all((some.codebooks[p] == whole.codebooks[p][rows]).all() for p in (4, 3, 2))
    monkeypatch.setattr(anyprecision, "TILE", 1)
    monkeypatch.setattr(tiles, "MAX_THREADS", 1)
    one_by_one = quantizer.quantize(weight, fisher(importance))
    assert (one_by_one.codes == whole.codes).all()
    assert all((one_by_one.codebooks[p] == whole.codebooks[p]).all() for p in (4, 3, 2))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_of_any_float_type(dtype: npt.DTypeLike) -> None:
    weight = sample("normal", "none", (4, 100))[0].astype(dtype)
    quantizer: Method = AnyPrecision()
    got, want = quantizer.quantize(weight, {}), quantizer.quantize(weight.astype(np.float32), {})
    assert (got.codes == want.codes).all()
    assert (got.codebooks[4] == want.codebooks[4]).all()


def test_zero_sensitivity_counts_all_alike() -> None:
    weight, _ = sample("normal", "none", (3, 150))
    importance = np.zeros_like(weight)
    importance[1] = np.arange(150)
    got = AnyPrecision().quantize(weight, fisher(importance))
    want = AnyPrecision().quantize(weight, {})
    assert [(a == b).all() for a, b in zip(got.codes, want.codes, strict=True)] == [True, False, True]


def test_distinct_values_survive_while_there_are_codes() -> None:
    weight = np.array([[3.0, -1.0, 3.0, 0.5, 0.5, -2.0, 3.0]], dtype=np.float32)
    nested = AnyPrecision().quantize(weight, {})
    assert (dequantize(pack(nested.codes, 4), nested.codebooks[4], 7) == weight).all()
    assert (dequantize(pack(nested.codes, 4)[:2], nested.codebooks[2], 7) == weight).all()


def test_largest_float16_is_kept_and_larger_refused() -> None:
    weight = np.array([[65504.0, -65504.0, 0.0]], dtype=np.float32)
    assert AnyPrecision().quantize(weight, {}).codebooks[4].max() == 65504
    weight[0, 1] = -65505
    with pytest.raises(PmpdError, match=re.escape("weight [0, 1] is -65505.0, not a number from -65504 to 65504")):
        AnyPrecision().quantize(weight, {})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = np.ones((70, 3000))
    weight[65, 2999] = bad
    with pytest.raises(PmpdError, match=re.escape(f"weight [65, 2999] is {bad}")):
        AnyPrecision(groups=3).quantize(weight, {})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9])
def test_impossible_sensitivities_are_refused(bad: float) -> None:
    sensitivity = np.ones((2, 9))
    sensitivity[1, 8] = bad
    with pytest.raises(PmpdError, match=re.escape(f"sensitivity [1, 8] is {bad}")):
        AnyPrecision().quantize(np.ones((2, 9)), fisher(sensitivity))


def test_shapes_that_do_not_fit_are_refused() -> None:
    quantizer = AnyPrecision()
    with pytest.raises(ValueError, match=re.escape("weight must be a matrix [N, K], got [3]")):
        quantizer.quantize(np.ones(3), {})
    with pytest.raises(ValueError, match=re.escape("weight must be a matrix [N, K], got [3, 0]")):
        quantizer.quantize(np.ones((3, 0)), {})
    with pytest.raises(ValueError, match=re.escape("sensitivity must be [2, 3] as the weight, got [3, 2]")):
        quantizer.quantize(np.ones((2, 3)), fisher(np.ones((3, 2))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parent": 9}, "parent precision must be 1 to 8 bits, got 9"),
        ({"parent": 3}, "precision must be 1 to 3 bits (the parent precision), got 4"),
        ({"precisions": (4, 0)}, "precision must be 1 to 4 bits (the parent precision), got 0"),
        ({"seed": 5}, "seed precision must be 1 to 4 bits (the parent precision), got 5"),
        ({"precisions": ()}, "precisions must be one or more, without repeats, got []"),
        ({"precisions": (3, 3)}, "precisions must be one or more, without repeats, got [3, 3]"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PmpdError, match=re.escape(message)):
        AnyPrecision(**options)


@pytest.mark.parametrize(
    ("codes", "codebooks"),
    [
        (np.zeros((2, 3), np.int64), {1: np.zeros((2, 1, 2), np.float16)}),
        (np.zeros(3, np.uint8), {1: np.zeros((3, 1, 2), np.float16)}),
        (np.zeros((2, 3), np.uint8), {1: np.zeros((2, 1, 2), np.float32)}),
        (np.zeros((2, 3), np.uint8), {2: np.zeros((2, 1, 2), np.float16)}),
        (np.zeros((2, 3), np.uint8), {1: np.zeros((2, 1, 2), np.float16), 2: np.zeros((2, 2, 4), np.float16)}),
    ],
)
def test_nested_codes_check_their_arrays(codes: Array, codebooks: dict[int, Array]) -> None:
    with pytest.raises(ValueError, match="must be"):
        NestedCodes(codes, codebooks)


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


PARAMETERS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")


@pytest.mark.parametrize("tied", [False, True])
def test_squared_gradients_are_those_of_autograd(tied: bool) -> None:
    batches = [torch.randint(50, (2, 12)), torch.randint(50, (1, 7))]
    model = tiny_llama(tied=tied).train()
    model.model.norm.weight.requires_grad_(False)
    got = squared_gradients(model, batches, PARAMETERS)
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())

    model.eval()
    named = dict(model.named_parameters(remove_duplicate=False))
    want = {name: torch.zeros_like(named[name]) for name in PARAMETERS}
    for ids in (row for batch in batches for row in batch):
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        for name, gradient in zip(PARAMETERS, torch.autograd.grad(loss, [named[n] for n in PARAMETERS]), strict=True):
            want[name] += gradient**2
    assert list(got) == list(PARAMETERS)
    for name, squares in got.items():
        assert squares.dtype == np.float32
        np.testing.assert_allclose(squares, want[name].detach().numpy(), rtol=1e-4, atol=1e-10)


def test_squared_gradients_of_a_half_precision_model_are_float32() -> None:
    ids = torch.randint(50, (2, 16))
    got = squared_gradients(tiny_llama().to(torch.bfloat16), [ids], PARAMETERS)
    want = squared_gradients(tiny_llama(), [ids], PARAMETERS)
    for name in PARAMETERS:
        assert got[name].dtype == np.float32
        assert np.corrcoef(got[name].ravel(), want[name].ravel())[0, 1] > 0.99


def test_squared_gradients_say_what_is_wrong() -> None:
    model = tiny_llama()
    with pytest.raises(PmpdError, match=r"no parameter 'model\.layers\.9\.weight'"):
        squared_gradients(model, [], ["model.layers.9.weight"])
    with pytest.raises(PmpdError, match="sequence 2 has 1 tokens"):
        squared_gradients(
            model, [torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)], PARAMETERS
        )
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(PmpdError, match="loss of calibration sequence 1 is nan"):
        squared_gradients(model, [torch.zeros(1, 4, dtype=torch.int64)], PARAMETERS)
    assert all(parameter.requires_grad for parameter in model.parameters())
