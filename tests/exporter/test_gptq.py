"""The method `gptq`: its statistic against plain hooks, its feedback and its codebooks against brute force."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_quantize import sample
from tiny_models import TINY_MODELS, plain_model, save_with_tokenizer

from pmpd.exporter import ExportConfig, export_bundle
from pmpd.exporter.calibrate import STATISTICS
from pmpd.exporter.quantize import Gptq, NestedCodes, Rtn, gptq
from pmpd.exporter.quantize.moments import damped, feedback, fitted, one_thread_each
from pmpd.runtime import Bundle
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import dequantize, group_size, pack

Array = npt.NDArray[Any]


def moments_of(columns: int, seed: int = 0, tokens: int = 400) -> Array:
    """Return second moments ``[K, K]`` of inputs that are correlated, and larger in some columns."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))
    inputs *= rng.exponential(1, columns)
    return (inputs.T @ inputs).astype(np.float32)


def output_error(weight: Array, nested: NestedCodes, p: int, H: Array, parent: int = 4) -> float:
    error = dequantize(pack(nested.codes, parent)[:p], nested.codebooks[p], weight.shape[1]).astype(np.float64) - weight
    return float(np.einsum("nk,kl,nl->", error, H.astype(np.float64), error))


# The statistic.


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3"])
def test_moments_are_those_of_plain_hooks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmpd.exporter.calibrate.moments.fast_dtype", lambda: torch.float32)
    model = plain_model(TINY_MODELS[name].save(tmp_path / "model"))
    ids = torch.randint(0, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    linears = {
        f"model.layers.{key}.weight": module
        for key, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    got: dict[str, Array] = {}
    statistic = STATISTICS["moments"]
    batches = list(ids.split(2))
    statistic.compute(
        model, batches, [*linears, "lm_head.weight"], lambda key, array: got.update({key: array}), progress
    )

    want = dict.fromkeys(linears, torch.zeros(()))
    for key, module in linears.items():

        def add(_: Any, inputs: Any, output: Any, key: str = key) -> None:
            tokens = inputs[0].detach().flatten(0, 1)
            want[key] = want[key] + tokens.T @ tokens

        module.register_forward_hook(add)
    with torch.no_grad():
        model(input_ids=ids[:, :-1])
    assert got.keys() == want.keys()
    for key, array in got.items():
        torch.testing.assert_close(torch.from_numpy(array), want[key], rtol=1e-4, atol=1e-4)
        assert array.nbytes == statistic.nbytes(key, *linears[key].weight.shape)


def progress(items: Any, total: int) -> Any:
    return items


# The feedback and the fit.


def test_the_factor_is_that_of_the_inverse() -> None:
    H = damped(moments_of(40), 40, 0.01)
    U = feedback(H).astype(np.float64)
    assert (np.tril(U, -1) == 0).all()
    np.testing.assert_allclose(U.T @ U @ H, np.eye(40), atol=1e-3)


@pytest.mark.parametrize(("least", "more"), [(-0.005, 0.01), (-0.05, 0.11), (-0.5, 1.11)])
def test_what_rounding_made_indefinite_is_damped_more(least: float, more: float) -> None:
    values = np.linspace(least, 2 - least, 40)  # a mean of 1
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    H = (basis * values @ basis.T).astype(np.float32)
    U = feedback(H).astype(np.float64)
    np.testing.assert_allclose(U.T @ U @ (H + more * np.eye(40)), np.eye(40), atol=1e-2)


def test_moments_of_nothing_have_a_factor() -> None:
    assert np.isfinite(feedback(np.zeros((3, 3), np.float32))).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_codes_are_those_of_solving_for_the_columns_that_are_left(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each column, those after it take the values of least output error, given all errors made so far."""
    monkeypatch.setattr(gptq, "BLOCK", 8)
    K, R, parent = 40, 12, 3
    weight, _ = sample("normal", "none", (R, K))
    H = damped(moments_of(K), K, 0.01).astype(np.float64)
    nested = Gptq(precisions=(parent,), parent=parent, groups=groups).quantize(weight, {"moments": moments_of(K)})
    values = dequantize(pack(nested.codes, parent), nested.codebooks[parent], K).astype(np.float64)
    left = weight.astype(np.float64)
    size = group_size(K, groups)
    for j in range(K):
        if j % size == 0:
            columns = left[:, j : j + size]
            np.testing.assert_allclose(nested.codebooks[parent][:, j // size, 0], columns.min(axis=1), rtol=2e-3)
            np.testing.assert_allclose(nested.codebooks[parent][:, j // size, -1], columns.max(axis=1), rtol=2e-3)
        book = nested.codebooks[parent][:, j // size].astype(np.float64)  # [R, L]
        distance = np.abs(left[:, j] - values[:, j])
        assert (distance <= np.abs(left[:, j, None] - book).min(axis=1) + 2e-3 * np.abs(book).max(axis=1)).all()
        errors = (values - weight)[:, : j + 1]
        change = np.linalg.solve(H[j + 1 :, j + 1 :], H[j + 1 :, : j + 1] @ errors.T).T
        left = np.concatenate([values[:, : j + 1], weight[:, j + 1 :] - change], axis=1)


@pytest.mark.parametrize("groups", [1, 2, 5])  # the last of five is empty
def test_codebooks_are_those_of_least_squares(groups: int) -> None:
    rng = np.random.default_rng(1)
    K, R, bits = 30, 4, 2
    weight, H = rng.standard_normal((R, K)).astype(np.float32), damped(moments_of(K), K, 0.01)
    codes = rng.integers(0, 3, (R, K)).astype(np.uint8)  # none has code 3
    start = {p: np.full((R, groups, 2**p), 7, dtype=np.float32) for p in (bits, 1)}
    books = fitted(weight, H, codes, start)
    root = np.linalg.cholesky(H.astype(np.float64)).T
    places = np.arange(K) // group_size(K, groups)
    for p, book in books.items():
        for r in range(R):
            chosen = np.eye(groups * 2**p)[places * 2**p + (codes[r] >> (bits - p))]  # [K, G L]
            want = np.linalg.lstsq(root @ chosen, root @ weight[r], rcond=None)[0]
            used = chosen.any(axis=0)
            np.testing.assert_allclose(book[r].ravel()[used], want[used], rtol=1e-2, atol=1e-3)
            assert book[r].ravel()[~used] == pytest.approx(7)


# The method.


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("values", ["normal", "heavy tails", "two bumps"])
def test_outputs_have_less_error_than_those_of_rounding_to_nearest(values: str, groups: int) -> None:
    weight, _ = sample(values, "none", (100, 96))
    H = moments_of(96)
    ours, nearest = (method(groups=groups).quantize(weight, {"moments": H}) for method in (Gptq, Rtn))
    for p, share in ((4, 0.65), (3, 0.8), (2, 0.85)):
        assert output_error(weight, ours, p, H) < share * output_error(weight, nearest, p, H)


def test_inputs_that_have_nothing_to_do_with_each_other_leave_rounding_to_nearest() -> None:
    weight, _ = sample("normal", "none", (20, 48))
    nearest = Rtn(groups=2).quantize(weight)
    for statistics in ({}, {"moments": np.eye(48)}, {"moments": np.zeros((48, 48))}):
        nested = Gptq(groups=2).quantize(weight, statistics)
        assert (nested.codes == nearest.codes).all()
        assert (nested.codebooks[4] == nearest.codebooks[4]).all()
        np.testing.assert_allclose(nested.codebooks[2], nearest.codebooks[2], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = sample("normal", "none", (300, 160))
    monkeypatch.setattr(gptq, "TILE", 64)
    statistics = {"moments": moments_of(160)}
    one = Gptq().quantize(weight, statistics)
    before = torch.get_num_threads()
    monkeypatch.setattr(gptq, "available_threads", lambda: threads)
    other = Gptq().quantize(weight, statistics)
    assert torch.get_num_threads() == before
    np.testing.assert_array_equal(one.codes, other.codes)
    assert all((one.codebooks[p] == other.codebooks[p]).all() for p in (4, 3, 2))


def test_threads_compute_alone() -> None:
    """A Cholesky factor may depend on how many threads torch takes for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with one_thread_each(2) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("value", [0.0, -0.3, 65504.0])
def test_what_needs_no_error_has_that_of_float16(value: float) -> None:
    weight = np.full((2, 24), value, dtype=np.float32)
    nested = Gptq(groups=5).quantize(weight, {"moments": moments_of(24)})  # two groups are empty
    for p in (4, 3, 2):
        restored = dequantize(pack(nested.codes, 4)[:p], nested.codebooks[p], 24)
        np.testing.assert_allclose(restored, weight, rtol=2.0**-9)


def test_moments_of_few_tokens_are_enough() -> None:
    weight, _ = sample("normal", "none", (20, 64))
    H = moments_of(64, tokens=3)
    H[5], H[:, 5] = 0, 0  # an input that is always zero
    nested = Gptq().quantize(weight, {"moments": H})
    assert all(np.isfinite(book).all() for book in nested.codebooks.values())


def test_what_does_not_fit_is_said() -> None:
    weight = np.zeros((5, 16), np.float32)
    message = "statistics must be [16, 16] for weights of 16 columns, got [8, 8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        Gptq().quantize(weight, {"moments": np.zeros((8, 8), np.float32)})
    with pytest.raises(PmpdError, match="the statistics are not finite"):
        Gptq().quantize(weight, {"moments": np.full((16, 16), np.nan, np.float32)})
    weight[3, 2] = np.inf
    with pytest.raises(PmpdError, match=re.escape("weight [3, 2] is inf, not a number from -65504 to 65504")):
        Gptq().quantize(weight, {"moments": moments_of(16)})


@pytest.mark.parametrize("groups", [1, 2])
def test_an_export_uses_it(groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 40)
    model = save_with_tokenizer(tmp_path / "model")
    with pytest.raises(PmpdError, match="method gptq needs a calibration text: leave out --calibration none"):
        ExportConfig(model=str(model), output=tmp_path / "bundle", method="gptq", calibration="none")
    config = ExportConfig(
        model=str(model), output=tmp_path / "bundle", method="gptq", precisions=(3,), targets=(), groups=groups,
        calibration=text, calibration_samples=4, calibration_length=32,
    )  # fmt: skip
    assert export_bundle(config).configuration["method"] == "gptq"
    Bundle.open(config.output, verify=True)
    (folder,) = (tmp_path / "cache" / "pmpd" / "statistics").iterdir()
    assert len(list(folder.iterdir())) == 7 * 2, "one of each linear layer of the blocks, none of the output layer"
