"""The method `guided`: its descent against brute force, and what it is worth."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_with_tokenizer

from pmpd.exporter import Export, ExportConfig, export_bundle
from pmpd.exporter.quantize import AnyPrecision, Guided, NestedCodes, native
from pmpd.exporter.quantize.descent import Rows, expanded
from pmpd.exporter.quantize.together import Together
from pmpd.runtime import Bundle
from pmpd.runtime.errors import MissingExtraError, PmpdError

Array = npt.NDArray[Any]

try:
    native.require_compiled()
except MissingExtraError as error:
    pytest.skip(f"needs a C compiler: {error}", allow_module_level=True)


def moments(columns: int, seed: int = 0, tokens: int = 200) -> Array:
    """Return second moments ``[K, K]`` of inputs that are correlated, and larger in some columns."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))
    inputs *= rng.exponential(1, columns)
    return (inputs.T @ inputs / tokens).astype(np.float32)


def losses(weight: Array, H: Array, codes: Array, codebook: Array) -> Array:
    error = np.take_along_axis(codebook.astype(np.float64), codes.astype(np.intp), 1) - weight
    loss: Array = np.einsum("nk,kl,nl->n", error, H.astype(np.float64), error)
    return loss


# The descent.


def plain_pass(codes: Array, H: Array, values: Array, weight: Array, gradient: Array) -> Array:
    """One pass as the docstring of `descent.c` says it, in float64."""
    codes, gradient, H = codes.copy(), gradient.astype(np.float64), H.astype(np.float64)
    for r, j in product(range(len(codes)), range(codes.shape[1])):
        steps = values[:, r] - values[:, r, codes[r, j], None]  # [P, L]
        rise = (weight[:, r, None] * steps * (2 * gradient[:, r, j, None] + H[j, j] * steps)).sum(0)
        best = int(rise.argmin())
        if rise[best] < 0:
            codes[r, j] = best
            gradient[:, r] += steps[:, best, None] * H[j]
    return codes


def start(weight: Array, H: Array, parent: int = 4, precisions: tuple[int, ...] = (4, 3, 2)) -> Rows:
    method = AnyPrecision(precisions=precisions, parent=parent, seed=1)
    nested = method.quantize(weight, {"fisher": np.broadcast_to(H.diagonal(), weight.shape)})
    return Rows(weight, H, parent, nested)


def errors(rows: Rows) -> Array:
    return np.stack([
        np.take_along_axis(book, (rows.codes >> (rows.parent - p)).astype(np.intp), 1) - rows.weight
        for p, book in rows.codebooks.items()
    ])  # fmt: skip


def descend(rows: Rows, importance: Array, *, rounds: int, passes: int) -> None:
    for _ in range(rounds):
        rows.descend(importance, passes=passes)
        rows.fit()


def test_losses_and_gradients_are_those_of_the_errors() -> None:
    rng = np.random.default_rng(4)
    H, weight = moments(150) + np.eye(150, dtype=np.float32), rng.standard_normal((7, 150)).astype(np.float32)
    rows = start(weight, H)
    rows.fit()
    rows.descend(np.ones((3, 7), np.float32), passes=1)
    changed = errors(rows)
    np.testing.assert_allclose(rows.losses(), np.einsum("prj,jk,prk->pr", changed, H, changed), rtol=1e-3)
    np.testing.assert_allclose(rows.norms, np.einsum("rj,jk,rk->r", weight, H, weight), rtol=1e-4)
    np.testing.assert_allclose(rows.products, changed @ H, rtol=1e-3, atol=1e-2)
    rows.fit()
    np.testing.assert_allclose(rows.products, errors(rows) @ H, rtol=1e-3, atol=1e-2)


def test_the_compiled_pass_does_what_it_says() -> None:
    rng = np.random.default_rng(0)
    H, weight = moments(40) + np.eye(40, dtype=np.float32), rng.standard_normal((6, 40)).astype(np.float32)
    rows = start(weight, H)
    importance = rng.random((3, 6)).astype(np.float32)
    gradient = (errors(rows) @ H).astype(np.float32)
    values = np.stack([expanded(book, rows.parent) for book in rows.codebooks.values()])
    expected = plain_pass(rows.codes, H, values, importance, gradient)
    codes = rows.codes.copy()
    assert native.descend(codes, H, values, importance, gradient) >= (codes != rows.codes).sum() > 0
    np.testing.assert_array_equal(codes, expected)
    rows.codes = codes
    np.testing.assert_allclose(gradient, errors(rows) @ H, atol=1e-3)


def test_sums_over_codes() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (5, 30)).astype(np.uint8)
    H = moments(30)
    chosen = np.eye(8)[codes]  # [R, K, L]
    lines, pairs = native.sums(codes, H, 8)
    np.testing.assert_allclose(lines, chosen.transpose(0, 2, 1) @ H, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(pairs, chosen.transpose(0, 2, 1) @ H @ chosen, rtol=1e-4, atol=1e-3)


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 30), st.sampled_from([0.01, 0.1, 2.0]))
@settings(max_examples=25)
def test_the_loss_never_rises(seed: int, parent: int, columns: int, damping: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(3, (4, columns)).astype(np.float32)
    H = moments(columns, seed, tokens=max(columns // 2, 1))
    H += damping * H.diagonal().mean() * np.eye(columns, dtype=np.float32)
    rows = start(weight, H, parent, tuple(range(parent, 0, -1)))
    importance = rng.random((parent, 4)).astype(np.float32)
    total = (importance * rows.losses()).sum(0)
    for _ in range(3):
        descend(rows, importance, rounds=1, passes=1)
        lower = (importance * rows.losses()).sum(0)
        # Codebooks are rounded to float16, which no descent can undo.
        rounding = 1e-4 * importance.sum(0) * np.einsum("rk,rk->r", weight @ H, weight)
        assert (lower <= 1.001 * total + rounding).all()
        total = lower


def test_small_rows_come_near_the_best_that_there_is() -> None:
    parent, columns, rows = 2, 5, 12
    rng = np.random.default_rng(3)
    weight, H = rng.standard_normal((rows, columns)).astype(np.float32), moments(columns)
    best = np.full(rows, np.inf)
    for codes in product(range(4), repeat=columns):
        total = np.zeros(rows)
        for p in (2, 1):
            chosen = np.eye(2**p)[np.array(codes) >> (parent - p)]  # [K, 2**p]
            book = np.linalg.pinv(chosen.T @ H @ chosen) @ chosen.T @ H @ weight.T  # [2**p, R]
            error = chosen @ book - weight.T
            total += np.einsum("kr,kl,lr->r", error, H, error)
        best = np.minimum(best, total)
    found = start(weight, H, parent, (2, 1))
    before = found.losses().sum(0)
    descend(found, np.ones((2, rows), np.float32), rounds=6, passes=3)
    after = found.losses().sum(0)
    assert (after >= best - 1e-3 * before).all()
    assert (after - best).sum() < 0.35 * (before - best).sum()


# Rows together.


def whole_losses(weight: Array, H: Array, B: Array, nested: NestedCodes, parent: int = 4) -> Array:
    """The loss at each precision as the docstring of `together.py` says it, in float64."""
    total = []
    for p, book in nested.codebooks.items():
        codes = (nested.codes >> (parent - p)).astype(np.intp)
        error = np.take_along_axis(book[:, 0].astype(np.float64), codes, 1) - weight
        total.append(((B.astype(np.float64) @ error @ H) * error).sum())
    return np.array(total)


def together(weight: Array, H: Array, B: Array, parent: int = 4, precisions: tuple[int, ...] = (4, 3, 2)) -> Together:
    method = AnyPrecision(precisions=precisions, parent=parent, seed=1)
    return Together(Rows(weight, H, parent, method.quantize(weight)), B)


def plus_diagonal(moments: Array, share: float = 0.1) -> Array:
    return (moments + share * moments.diagonal().mean() * np.eye(len(moments))).astype(np.float32)


def test_the_compiled_pass_knows_rows_that_matter_to_each_other() -> None:
    rng = np.random.default_rng(0)
    H, weight = moments(20) + np.eye(20, dtype=np.float32), rng.standard_normal((6, 20)).astype(np.float32)
    rows = start(weight, H)
    values = np.stack([expanded(book, rows.parent) for book in rows.codebooks.values()])
    between = rng.uniform(-0.5, 0.5, (6, 6)).astype(np.float32)
    np.fill_diagonal(between, 0)
    own = (errors(rows) @ H).astype(np.float32)
    gradient = own + between @ own
    codes, importance = rows.codes.copy(), np.ones((3, 6), np.float32)
    changes = native.descend(codes, H, values, importance, gradient.copy(), np.ascontiguousarray(between.T), gradient)

    expected, slopes = rows.codes.copy(), gradient.astype(np.float64)
    for j, r in product(range(20), range(6)):
        steps = values[:, r] - values[:, r, expected[r, j], None]  # [P, L]
        rise = (steps * (2 * slopes[:, r, j, None] + H[j, j] * steps)).sum(0)
        best = int(rise.argmin())
        if rise[best] < 0:
            slopes += (np.eye(6) + between)[:, r, None] * (steps[:, best, None] * H[j])[:, None]
            expected[r, j] = best
    np.testing.assert_array_equal(codes, expected)
    assert changes >= (codes != rows.codes).sum() > 0


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 20), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_together_the_loss_never_rises(seed: int, parent: int, columns: int, rows: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(3, (rows, columns)).astype(np.float32)
    H = plus_diagonal(moments(columns, seed, tokens=max(columns // 2, 1)))
    B = plus_diagonal(moments(rows, seed + 1, tokens=2))  # of two tokens: all rows are nearly alike
    precisions = tuple(range(parent, 0, -1))
    layer = together(weight, H, B, parent, precisions)
    importance = rng.random(parent).astype(np.float32)
    total = (importance * whole_losses(weight, H, B, layer.rows.nested, parent)).sum()
    rounding = 1e-5 * importance.sum() * np.einsum("rk,rk->", B @ weight @ H, weight)
    for _ in range(3):
        layer.descend(importance, tile=tile, passes=2)
        losses = whole_losses(weight, H, B, layer.rows.nested, parent)
        np.testing.assert_allclose(layer.rows.products, errors(layer.rows) @ H, rtol=1e-2, atol=1e-3 * np.abs(H).max())
        lower = (importance * losses).sum()
        assert lower <= 1.001 * total + rounding
        total = lower


def test_rows_together_are_better_than_by_themselves() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((60, 64)).astype(np.float32)
    H, B = moments(64), moments(60, seed=5)
    alone = Guided(sweeps=0).quantize(weight, {"guided": H, "outputs": B[None]})
    both = Guided().quantize(weight, {"guided": H, "outputs": B[None]})
    ratio = [whole_losses(weight, plus_diagonal(H), plus_diagonal(B), nested) for nested in (both, alone)]
    assert (ratio[0] < [0.8 * ratio[1][0], 0.85 * ratio[1][1], 0.93 * ratio[1][2]]).all()
    blocks = np.stack([B[:30, :30], B[30:, 30:]])
    in_two = Guided().quantize(weight, {"guided": H, "outputs": blocks})
    halves = [
        Guided().quantize(part, {"guided": H, "outputs": b[None]})
        for part, b in zip((weight[:30], weight[30:]), blocks, strict=True)
    ]
    np.testing.assert_array_equal(in_two.codes, NestedCodes.stack(halves).codes)
    unrelated = Guided().quantize(weight, {"guided": H})
    np.testing.assert_array_equal(unrelated.codes, alone.codes)


def test_small_layers_come_near_the_best_that_there_is() -> None:
    weight = np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
    H, B = plus_diagonal(moments(3)), plus_diagonal(moments(3, seed=2))
    best = np.inf
    for codes in product(range(2), repeat=9):
        chosen = np.zeros((9, 6))  # each weight by the six numbers of the codebooks
        for place, code in enumerate(codes):
            chosen[place, 2 * (place // 3) + code] = 1
        hessian = np.kron(B, H).astype(np.float64)
        book = np.linalg.pinv(chosen.T @ hessian @ chosen) @ chosen.T @ hessian @ weight.ravel()
        error = chosen @ book - weight.ravel()
        best = min(best, error @ hessian @ error)
    layer = together(weight, H, B, 1, (1,))
    before = whole_losses(weight, H, B, layer.rows.nested, 1)[0]
    for _ in range(20):
        layer.descend(np.ones(1, np.float32), tile=2, passes=2)
    assert best - 1e-3 * before <= whole_losses(weight, H, B, layer.rows.nested, 1)[0] < best + 0.35 * (before - best)


# The method.


def test_every_precision_has_less_output_error_than_k_means() -> None:
    rng = np.random.default_rng(0)
    weight, H = rng.standard_normal((100, 96)).astype(np.float32), moments(96, tokens=2000)
    damped = H + 0.1 * H.diagonal().mean() * np.eye(96, dtype=np.float32)
    guided = Guided().quantize(weight, {"guided": H})
    means = AnyPrecision().quantize(weight, {"fisher": np.broadcast_to(damped.diagonal(), weight.shape)})
    for p in (4, 3, 2):
        ours, theirs = (losses(weight, damped, q.codes >> (4 - p), q.codebooks[p][:, 0]) for q in (guided, means))
        assert (ours <= 1.001 * theirs).mean() > 0.95
        assert ours.sum() < 0.93 * theirs.sum()


def test_no_row_is_worse_than_its_start_in_sum() -> None:
    rng = np.random.default_rng(1)
    weight, H = rng.standard_t(2, (80, 33)).astype(np.float32), moments(33, tokens=20)
    scaled = H / H.diagonal().mean() + 0.1 * np.eye(33, dtype=np.float32)
    guided = Guided().quantize(weight, {"guided": H})
    means = AnyPrecision().quantize(weight, {"fisher": np.broadcast_to(scaled.diagonal(), weight.shape)})
    shares = np.zeros(len(weight))
    for p in (4, 3, 2):
        ours, theirs = (losses(weight, scaled, q.codes >> (4 - p), q.codebooks[p][:, 0]) for q in (guided, means))
        shares += ours / theirs
    assert (shares <= 3.001).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    statistics = {"guided": moments(64), "outputs": moments(200)[None]}
    one = Guided().quantize(weight, statistics)
    before = torch.get_num_threads()
    monkeypatch.setattr("pmpd.exporter.quantize.guided.available_threads", lambda: threads)
    other = Guided().quantize(weight, statistics)
    assert torch.get_num_threads() == before
    np.testing.assert_array_equal(one.codes, other.codes)
    assert all((one.codebooks[p] == other.codebooks[p]).all() for p in (4, 3, 2))


@pytest.mark.parametrize("weight", [np.zeros((3, 8)), np.full((3, 8), -0.3), np.tile([1.0, -2.0], (3, 4))])
def test_what_needs_no_error_has_none(weight: Array) -> None:
    nested = Guided().quantize(weight.astype(np.float32), {"guided": moments(8)})
    for p in (4, 3, 2):
        values = np.take_along_axis(nested.codebooks[p][:, 0], (nested.codes >> (4 - p)).astype(np.intp), 1)
        np.testing.assert_array_equal(values, weight.astype(np.float16))


def test_inputs_that_say_nothing() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    nested = Guided().quantize(weight, {"guided": np.zeros((16, 16), np.float32)})
    assert all(np.isfinite(book).all() for book in nested.codebooks.values())


def test_what_does_not_fit_is_said() -> None:
    weight = np.zeros((5, 16), np.float32)
    message = "statistics must be [16, 16] for weights of 16 columns, got [8, 8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        Guided().quantize(weight, {"guided": np.zeros((8, 8), np.float32)})
    with pytest.raises(PmpdError, match="the statistics are not finite"):
        Guided().quantize(weight, {"guided": np.full((16, 16), np.nan, np.float32)})
    with pytest.raises(PmpdError, match="one codebook a row, got 2 groups: use --groups 1"):
        Guided(groups=2)


def test_wide_layers_of_many_codes_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((70, 32)).astype(np.float32)
    whole = Guided().quantize(weight, {"guided": moments(32)})
    seen: list[int] = []

    def sums(codes: Array, H: Array, levels: int) -> tuple[Array, Array]:
        lines, pairs = once(codes, H, levels)
        seen.append((lines.base if lines.base is not None else lines).nbytes)
        return lines, pairs

    once = native.sums
    monkeypatch.setattr(native, "sums", sums)
    monkeypatch.setattr("pmpd.exporter.quantize.guided.SCRATCH", 1 << 16)
    parts = Guided().quantize(weight, {"guided": moments(32)})
    assert max(seen) <= 1 << 16
    np.testing.assert_array_equal(parts.codes, whole.codes)


@pytest.mark.parametrize("missing", ["a compiler", "one group"])
def test_what_it_cannot_do_is_said_before_any_work(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 40)
    model = save_with_tokenizer(tmp_path / "model")
    groups, message = (2, "use --groups 1") if missing == "one group" else (1, "ziglang is not installed")
    if missing == "a compiler":

        def compiler() -> None:
            raise MissingExtraError("ziglang", "tune")

        monkeypatch.setattr("pmpd.exporter.quantize.guided.require_compiled", compiler)
    config = ExportConfig(
        model=str(model), output=tmp_path / "bundle", method="guided", targets=(), calibration=text, groups=groups
    )
    with pytest.raises(PmpdError, match=message):
        Export.prepare(config)
    assert not list(tmp_path.glob("bundle*"))


def test_an_export_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 40)
    model = save_with_tokenizer(tmp_path / "model")
    config = ExportConfig(
        model=str(model), output=tmp_path / "bundle", method="guided", targets=(), calibration=text,
        calibration_samples=4, calibration_length=32,
    )  # fmt: skip
    manifest = export_bundle(config)
    assert manifest.configuration["method"] == "guided"
    Bundle.open(config.output, verify=True)
    for threads in (1, 3):  # however many layers are worked on at a time
        monkeypatch.setattr("pmpd.exporter.pipeline.available_threads", lambda threads=threads: threads)
        other = export_bundle(replace(config, output=tmp_path / f"threads-{threads}"))
        assert other.files["weights.bin"] == manifest.files["weights.bin"]
    (folder,) = (tmp_path / "cache" / "pmpd" / "statistics").iterdir()
    kinds = {key: len(list(group)) for key, group in groupby(sorted(f.name.split(".")[0] for f in folder.iterdir()))}
    assert kinds == {"model": 7 * 2}, "one of each linear layer of the blocks, none of the output layer"
