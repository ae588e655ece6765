"""Quantization methods side by side on layers of SmolLM2.

``pytest -s -m slow`` prints the table of `quantize/README.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pmpd.exporter.calibrate import STATISTICS
from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.quantize import METHODS, Hqq, NestedCodes, Rtn
from pmpd.runtime.errors import MissingExtraError
from pmpd.runtime.format.bitplanes import dequantize, pack

Array = npt.NDArray[Any]

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{kind}.weight" for block in (2, 15, 27) for kind in KINDS]
GROUPS = 9  # of 64 columns in rows of 576


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts(smollm2: Path, wikitext: Path) -> dict[str, list[torch.Tensor]]:
    """16,384 tokens to quantize by, and as many to measure on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = {name: (wikitext / f"wiki.{name}.raw").read_text(encoding="utf-8")[:400_000] for name in ("valid", "test")}
    return {name: calibration_batches(tokenizer(text)["input_ids"], 64, 256) for name, text in texts.items()}


def statistic(name: str, model: Any, batches: Sequence[torch.Tensor]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    STATISTICS[name].compute(model, batches, LAYERS, arrays.__setitem__, lambda items, total: items)
    return arrays


def errors(weight: Array, nested: NestedCodes, parent: int, H: Array) -> dict[int, tuple[float, float]]:
    """Return by precision the squared error of weights and that of outputs, over the squares of both."""
    result = {}
    for p, codebook in nested.codebooks.items():
        error = dequantize(pack(nested.codes, parent)[:p], codebook, weight.shape[1]) - weight
        share = np.einsum("nk,nk->", error @ H, error) / np.einsum("nk,nk->", weight @ H, weight)
        result[p] = (float((error**2).sum() / (weight**2).sum()), float(share))
    return result


@pytest.mark.slow
def test_methods_side_by_side(model: Any, texts: dict[str, list[torch.Tensor]]) -> None:
    from pmpd.exporter.calibrate.guided import unpacked

    statistics = {name: statistic(name, model, texts["valid"]) for name in ("moments", "guided", "fisher")}
    for layer, array in statistics["guided"].items():  # of inputs alone: rows by themselves
        columns = model.get_parameter(layer).shape[1]
        statistics["guided"][layer] = unpacked(array[: columns**2].reshape(columns, columns))
    held_out = statistic("moments", model, texts["test"])
    rows: dict[tuple[str, ...], list[dict[int, tuple[float, float]]]] = {}

    def note(row: tuple[str, ...], layer: str, quantizer: Any, needs: Sequence[str]) -> None:
        weight = model.get_parameter(layer).detach().numpy()
        nested = quantizer.quantize(weight, {name: statistics[name][layer] for name in needs})
        rows.setdefault(row, []).append(errors(weight, nested, quantizer.parent, held_out[layer]))

    for layer in LAYERS:
        for name, method in METHODS.items():
            for needs in {tuple(method.requires), tuple(method.needs)}:
                title = f"{name}, calibrated" if needs else name
                try:
                    note((title, "nested"), layer, method(precisions=(4, 3, 2), parent=4, seed=2, groups=1), needs)
                    for p in (4, 3, 2):
                        alone = method(precisions=(p,), parent=p, seed=min(p, 2), groups=1)
                        note((title, "alone"), layer, alone, needs)
                except MissingExtraError:  # no C compiler
                    continue
                if name != "guided":
                    grouped = method(precisions=(4, 3, 2), parent=4, seed=2, groups=GROUPS)
                    note((title, f"nested, {GROUPS} groups"), layer, grouped, needs)
        for unfitted in (Rtn(fitted=False), Hqq(fitted=False)):
            note((unfitted.name, "nested, middles of runs"), layer, unfitted, ())

    means: dict[tuple[str, ...], dict[int, Array]] = {}
    for row, measured in rows.items():
        means[row] = {p: np.mean([m[p] for m in measured if p in m], axis=0) for p in (4, 3, 2)}
        cells = " | ".join(f"{100 * means[row][p][i]:.2f}" for i in (0, 1) for p in (4, 3, 2))
        sys.stdout.write(f"| {' | '.join(row)} | {cells} |\n")
    for p in (4, 3, 2):
        nearest, own = means["rtn", "nested"][p], means["rtn", "alone"][p]
        assert (means["gptq, calibrated", "nested"][p] < nearest)[1]
        assert (means["hqq", "nested"][p] < 1.01 * nearest).all()
        assert (means["anyprecision", "nested"][p] < nearest).all()
        assert (nearest <= own).all(), "truncating codes costs nothing"
