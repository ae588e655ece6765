"""Methods of evenly spaced levels, `rtn` and `hqq`: against brute force, and what truncating codes costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import VALUES, sample
from tiny_models import save_with_tokenizer

from pmpd.exporter import ExportConfig, export_bundle
from pmpd.exporter.cli import main
from pmpd.exporter.quantize import METHODS, Hqq, NestedCodes, Rtn, rtn, tiles
from pmpd.runtime import Bundle
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import dequantize, group_size, pack

Array = npt.NDArray[Any]


def restored(nested: NestedCodes, p: int, parent: int = 4) -> Array:
    K = nested.codes.shape[1]
    return dequantize(pack(nested.codes, parent)[:p], nested.codebooks[p], K).astype(np.float64)


def squared_error(weight: Array, nested: NestedCodes, p: int) -> float:
    return float(((restored(nested, p) - weight) ** 2).sum())


@given(
    method=st.sampled_from([Rtn, Hqq]),
    values=st.sampled_from(sorted(VALUES)),
    N=st.integers(1, 4),
    K=st.integers(1, 200),
    groups=st.integers(1, 5),
    parent=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_any_matrix_keeps_the_contract(
    method: type[Rtn], values: str, N: int, K: int, groups: int, parent: int, seed: int
) -> None:
    weight, _ = sample(values, "none", (N, K), seed)
    precisions = tuple(range(parent, 0, -1))
    nested = method(precisions=precisions, parent=parent, seed=1, groups=groups).quantize(weight)
    size = group_size(K, groups)
    for p, codebook in nested.codebooks.items():
        assert codebook.shape == (N, groups, 2**p)
        assert np.isfinite(codebook).all()
        got = restored(nested, p, parent)
        for n, k in np.ndindex(N, -(-K // size)):
            columns = np.s_[n, k * size : (k + 1) * size]
            x, codes = weight[columns].astype(np.float64), nested.codes[columns] >> (parent - p)
            assert (np.diff(codes[np.argsort(x)].astype(int)) >= 0).all(), "codes ascend with the values"
            if p < parent:
                for code in np.unique(codes):
                    assert got[columns][codes == code] == pytest.approx(
                        x[codes == code].mean(), rel=2.0**-10, abs=2.0**-24
                    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("values", sorted(VALUES))
def test_rtn_takes_the_nearest_of_evenly_spaced_levels(values: str, groups: int) -> None:
    weight, _ = sample(values, "none", (6, 100))
    nested = Rtn(groups=groups).quantize(weight)
    size = group_size(100, groups)
    for n, g in np.ndindex(6, groups):
        columns = np.s_[n, g * size : (g + 1) * size]
        x = weight[columns].astype(np.float64)
        levels = np.linspace(x.min(), x.max(), 16)
        step = levels[1] - levels[0]
        distance = np.abs(x[:, None] - levels)
        taken = np.take_along_axis(distance, nested.codes[columns].astype(np.intp)[:, None], 1)[:, 0]
        assert (taken <= distance.min(axis=1) + 1e-3 * step + 1e-6 * np.abs(x)).all()
        np.testing.assert_allclose(nested.codebooks[4][n, g], levels, rtol=2.0**-10, atol=2.0**-24 + 2.0**-10 * step)


@pytest.mark.parametrize("values", ["normal", "heavy tails", "two bumps", "rows apart"])
def test_truncated_codes_leave_less_error_than_a_grid_of_their_own(values: str) -> None:
    """The middles of runs of levels are closer than the levels of a grid that must hit the extremes."""
    weight, _ = sample(values, "none", (32, 300))
    middles, means = (Rtn(fitted=fitted).quantize(weight) for fitted in (False, True))
    for p in (3, 2):
        own = Rtn(precisions=(p,), parent=p, seed=1).quantize(weight)
        alone = float(((restored(own, p, p) - weight) ** 2).sum())
        assert squared_error(weight, means, p) < squared_error(weight, middles, p) < alone
    assert squared_error(weight, means, 4) == squared_error(weight, middles, 4)


def lp_error(weight: Array, low: Array, step: Array, levels: int, norm: float = 0.7) -> Array:
    """Return each row's sum of powers of errors, in steps, for a grid."""
    positions = (weight - low) / step
    errors = positions - np.rint(positions).clip(0, levels - 1)
    return (np.abs(errors) ** norm).sum(axis=1)


def grid_of(nested: NestedCodes, p: int) -> tuple[Array, Array]:
    book = nested.codebooks[p][:, 0].astype(np.float64)
    return book[:, :1], (book[:, -1:] - book[:, :1]) / (2**p - 1)


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("values", ["normal", "heavy tails", "two bumps"])
def test_hqq_lowers_the_sum_it_is_about_towards_the_least_of_all_places(values: str, p: int) -> None:
    weight, _ = sample(values, "none", (40, 24))
    weight = weight.astype(np.float64)
    low, high = weight.min(axis=1, keepdims=True), weight.max(axis=1, keepdims=True)
    step = (high - low) / (2**p - 1)
    start = lp_error(weight, low, step, 2**p)
    shifts = np.linspace(-1, 1, 801)
    least = np.min([lp_error(weight, low + shift * step, step, 2**p) for shift in shifts], axis=0)
    found_low, found_step = grid_of(Hqq(precisions=(p,), parent=p).quantize(weight), p)
    np.testing.assert_allclose(found_step, step, rtol=2e-3)
    found = lp_error(weight, found_low, step, 2**p)
    assert (found <= 1.02 * start).all()  # float16 codebooks
    assert found.sum() < start.sum() - 0.58 * (start - least).sum()


@pytest.mark.parametrize("method", [Rtn, Hqq])
def test_rows_tiles_and_threads_are_independent(method: type[Rtn], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = sample("heavy tails", "none", (37, 130))
    whole = method(groups=2).quantize(weight)
    some = method(groups=2).quantize(weight[[17, 3]])
    assert (some.codes == whole.codes[[17, 3]]).all()
    monkeypatch.setattr(rtn, "TILE", 1)
    monkeypatch.setattr(tiles, "MAX_THREADS", 1)
    one_by_one = method(groups=2).quantize(weight)
    assert (one_by_one.codes == whole.codes).all()
    for p in (4, 3, 2):
        assert (one_by_one.codebooks[p] == whole.codebooks[p]).all()
        assert (some.codebooks[p] == whole.codebooks[p][[17, 3]]).all()


@pytest.mark.parametrize("method", [Rtn, Hqq])
def test_scaled_weights_have_the_same_codes(method: type[Rtn]) -> None:
    weight, _ = sample("normal", "none", (8, 96))
    assert (method().quantize(weight / 64).codes == method().quantize(weight).codes).all()


@pytest.mark.parametrize("method", [Rtn, Hqq])
@pytest.mark.parametrize("value", [-0.3, 65504.0])
def test_what_needs_no_error_has_none(method: type[Rtn], value: float) -> None:
    weight = np.full((2, 24), value, dtype=np.float32)
    nested = method(groups=5).quantize(weight)  # two of them empty
    for p in (4, 3, 2):
        assert (restored(nested, p) == weight.astype(np.float16)).all()
        assert (nested.codebooks[p][:, :3] == np.float16(value)).all(), "no level is outside of the weights' range"


def test_a_grid_that_moves_beyond_float16_stays_finite() -> None:
    weight = np.array([[65504.0, -65504.0, *[50000.0] * 10]], dtype=np.float32)
    nested = Hqq(precisions=(2, 1), parent=2, seed=1).quantize(weight)
    codebook = nested.codebooks[2][0, 0]
    assert codebook[0] == -65504
    assert np.isfinite(codebook).all()


@pytest.mark.parametrize("method", [Rtn, Hqq])
def test_weights_that_are_no_numbers_are_refused(method: type[Rtn]) -> None:
    with pytest.raises(PmpdError, match=r"weight \[1, 2\] is nan, not a number from -65504 to 65504"):
        method().quantize(np.array([[0, 1, 2], [0, 1, np.nan]]))
    with pytest.raises(PmpdError, match="precision must be 1 to 3 bits"):
        method(parent=3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_an_export_uses_it_without_calibration(method: str, groups: int, tmp_path: Path) -> None:
    model = save_with_tokenizer(tmp_path / "model")
    config = ExportConfig(
        model=str(model), output=tmp_path / "bundle", method=method, precisions=(3, 2), groups=groups, targets=()
    )
    manifest = export_bundle(config)
    assert manifest.configuration["method"] == method
    Bundle.open(config.output, verify=True)
    with pytest.raises(PmpdError, match=f"method {method} uses no calibration text: leave out --calibration"):
        replace(config, calibration=model / "config.json")


def test_the_help_names_every_method() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    option = text.partition("--method")[2].partition("--seed-precision")[0]
    assert all(name in option.replace(",", " ").replace(";", " ").split() for name in METHODS)
