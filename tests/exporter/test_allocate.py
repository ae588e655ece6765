"""Which layers of a mix read more planes: the best choice there is, held to brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.exporter.allocate import allocate
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.precision import describe_mix, mean_planes

Losses = dict[str, dict[int, float]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Losses, dict[str, int]]:
    """Up to six layers of at most a fifth of all bytes or so, which may read 2, 3 or 4 planes."""
    names = "abcdefgh"[: draw(st.integers(5, 6))]
    losses = {name: {planes: draw(st.integers(0, 30)) / 4 for planes in (4, 3, 2)} for name in names}
    return losses, {name: 64 * draw(st.integers(5, 8)) for name in names}


def total(losses: Losses, mix: dict[str, int]) -> float:
    return sum(losses[layer][planes] for layer, planes in mix.items())


@given(cases(), st.sampled_from((2.25, 2.5, 3.1, 3.75)))
def test_no_other_choice_within_the_bytes_loses_less(case: tuple[Losses, dict[str, int]], precision: float) -> None:
    losses, sizes = case
    choices = (dict(zip(losses, planes, strict=True)) for planes in product((2, 3, 4), repeat=len(losses)))
    best = min(total(losses, mix) for mix in choices if mean_planes(mix, sizes) <= precision)
    try:
        mix = allocate(losses, sizes, precision)
    except PmpdError:  # what loses least reads far less than it may
        return
    assert mean_planes(mix, sizes) <= precision
    assert total(losses, mix) == best


@pytest.mark.parametrize("cells", [500, 100_000])
def test_a_higher_precision_never_loses_more(cells: int) -> None:
    random = np.random.default_rng(0)
    names = [f"layer {i}" for i in range(30)]
    losses = {name: dict(zip((4, 3, 2), np.sort(random.random(3)), strict=True)) for name in names}
    sizes = {name: 64 * int(random.integers(10, 1000)) for name in names}
    mixes = [allocate(losses, sizes, precision, cells=cells) for precision in np.arange(2.2, 4, 0.1).round(2)]
    sums = [total(losses, mix) for mix in mixes]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[0]


def test_what_cannot_be_allocated_is_said() -> None:
    few: Losses = {"a": {4: 1.0, 3: 2.0}, "b": {4: 1.0, 3: 2.0}}
    with pytest.raises(PmpdError, match=r"precision 3\.4: the nearest mix of these layers reads 3\.09 planes: choose"):
        allocate(few, {"a": 640, "b": 64}, 3.4)
    with pytest.raises(PmpdError, match="the loss of a is not finite"):
        allocate({"a": {4: float("nan"), 3: 1.0}}, {"a": 64}, 3.5)


def test_a_mix_in_short() -> None:
    layers = [(i, part) for i in range(3) for part in ("v_proj", "down_proj")]
    mix = {f"model.layers.{i}.{part}": 4 if part == "v_proj" or i == 2 else 3 for i, part in layers}
    others = {f"model.layers.{i}.o_proj": 3 for i in range(3)}
    assert describe_mix(mix | others) == "down_proj 4 in 1 of 3, v_proj 4 in 3 of 3, the others 3"
    assert describe_mix(others) == "all 3"
