"""From logits to a token: sets against brute force, draws against probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pmpd.runtime import PmpdError, Sampling
from pmpd.runtime.decode.sampling import Sampler, left_out

Logits = npt.NDArray[np.float32]


def logits_of(*values: float) -> Logits:
    return np.array(values, dtype=np.float32)


def distribution(logits: Logits, **options: float) -> dict[int, float]:
    ids, p = Sampler(Sampling(**options)).distribution(logits)  # type: ignore[arg-type]
    return dict(zip(ids.tolist(), p.tolist(), strict=True))


# Distinct values, so that "the k most likely" is one set.
distinct_logits = st.lists(st.integers(-300, 300), min_size=1, max_size=40, unique=True).map(
    lambda values: np.array(values, dtype=np.float32) / 16
)


@given(distinct_logits)
def test_default_is_greedy(logits: Logits) -> None:
    assert Sampler(Sampling())(logits, []) == int(logits.argmax())


@given(distinct_logits, st.integers(0, 50), st.floats(0.01, 1), st.floats(0.05, 4))
def test_top_k_and_top_p_against_brute_force(logits: Logits, top_k: int, top_p: float, temperature: float) -> None:
    # By the definitions: rank, keep k, renormalize, keep the shortest head that reaches p, renormalize.
    ranked = sorted(range(logits.size), key=lambda i: -float(logits[i]))
    ranked = ranked[:top_k] if top_k else ranked
    best = float(logits[ranked[0]])
    weights = [math.exp((float(logits[i]) - best) / temperature) for i in ranked]
    p = [weight / math.fsum(weights) for weight in weights]
    reached = [math.fsum(p[: n + 1]) for n in range(len(p))]
    assume(all(abs(total - top_p) > 1e-9 for total in reached[:-1]))  # rounding would decide
    count = len(p) if top_p == 1 else next((n + 1 for n, total in enumerate(reached) if total >= top_p), len(p))
    want = {i: value / reached[count - 1] for i, value in zip(ranked[:count], p, strict=False)}
    got = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert got.keys() == want.keys()
    assert math.fsum(got.values()) == pytest.approx(1)
    for i, value in want.items():
        assert got[i] == pytest.approx(value, abs=1e-9)


def test_min_p_is_relative_to_the_likeliest_token() -> None:
    logits = logits_of(*np.log([0.5, 0.3, 0.15, 0.05]))
    got = distribution(logits, temperature=1, min_p=0.25)
    assert got == pytest.approx({0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95})
    assert got.keys() == distribution(logits, temperature=1, top_p=0.9, min_p=0.25).keys()
    assert distribution(logits, temperature=1, top_k=2, min_p=0.25).keys() == {0, 1}
    assert distribution(logits, temperature=1, min_p=1).keys() == {0}
    # Of probabilities at the temperature: a high one brings tokens nearer.
    assert distribution(logits, temperature=4, min_p=0.25).keys() == {0, 1, 2, 3}


def test_fields_that_are_left_out_are_named() -> None:
    off = {"typical_p": 1.0, "epsilon_cutoff": 0, "num_beams": 1, "suppress_tokens": None, "bad_words_ids": []}
    assert left_out({"do_sample": True, "min_p": 0.1, "eos_token_id": 2, **off}) == []
    assert left_out({**off, "typical_p": 0.9, "eta_cutoff": 3e-4}) == ["typical_p", "eta_cutoff"]


def test_temperature_divides_the_logits() -> None:
    got = distribution(logits_of(0, math.log(4)), temperature=2)
    assert got[1] / got[0] == pytest.approx(2)  # sqrt(4)


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = logits_of(0.5, 2, 1.5)
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        sampler = Sampler(Sampling(temperature=1, **options))
        assert {sampler(logits, []) for _ in range(50)} == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 1e-320])
def test_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    assert {sampler(logits_of(-3, 9, 8.5, 9.5), []) for _ in range(20)} == {3}


def test_same_seed_same_draws() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [sampler(logits, []) for _ in range(10)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(0, 1, 2, 0.5, -20)
    sampler = Sampler(Sampling(temperature=1.3, top_k=3, seed=0))
    want = distribution(logits, temperature=1.3, top_k=3)
    count = 4000
    drawn = [sampler(logits, []) for _ in range(count)]
    assert set(drawn) == want.keys() == {1, 2, 3}
    chi_square = sum((drawn.count(i) - count * p) ** 2 / (count * p) for i, p in want.items())
    assert chi_square < 13.8  # 2 degrees of freedom: exceeded once in a thousand seeds, and this seed is fixed


def test_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lowest:
        def random(self) -> float:
            return 0.0

    sampler = Sampler(Sampling(temperature=1))
    monkeypatch.setattr(sampler, "_random", Lowest())
    assert sampler(logits_of(-math.inf, -math.inf, 0, 1), []) == 2


def test_repetition_penalty_by_hand() -> None:
    logits = logits_of(3, 2, -1, -3)
    before = logits.copy()
    sampler = Sampler(Sampling(repetition_penalty=2))
    assert sampler(logits, []) == 0
    assert sampler(logits, [0]) == 1  # 3 / 2 < 2
    assert sampler(logits, [0, 0, 0]) == 1  # counts once however often it came
    assert sampler(logits, [0, 1]) == 0  # 1.5 > 1
    assert np.array_equal(logits, before)  # the caller's logits are not touched
    assert Sampler(Sampling(repetition_penalty=2))(logits_of(-1, -1.5), [0]) == 1  # -1 * 2 < -1.5
    assert Sampler(Sampling(repetition_penalty=0.5))(logits_of(1, 1.5), [0]) == 0  # 1 / 0.5 > 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 (greedy) or more, got -0.1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_k": -1}, "top-k must be 0 (off) or more, got -1"),
        ({"top_p": 0.0}, "top-p must be in (0, 1], got 0.0"),
        ({"top_p": 1.01}, "top-p must be"),
        ({"top_p": math.nan}, "top-p must be"),
        ({"min_p": -0.1}, "min-p must be 0 (off) to 1, got -0.1"),
        ({"min_p": 1.5}, "min-p must be"),
        ({"min_p": math.nan}, "min-p must be"),
        ({"repetition_penalty": 0.0}, "repetition penalty must be greater than 0"),
        ({"repetition_penalty": math.nan}, "repetition penalty must be"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_values_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(PmpdError) as caught:
        Sampling(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.8}, Sampling()),  # greedy without do_sample
        ({"do_sample": False, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"do_sample": True}, Sampling(temperature=1, top_k=50)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": None, "top_p": 0.95, "min_p": 0.1},
            Sampling(temperature=0.6, top_k=50, top_p=0.95, min_p=0.1),
        ),
        ({"do_sample": True, "temperature": 0.3, "top_k": 0}, Sampling(temperature=0.3)),
    ],
)
def test_what_the_authors_recommend(config: dict[str, Any], wanted: Sampling) -> None:
    assert Sampling.from_config(config) == wanted


@pytest.mark.parametrize("value", ["hot", True, [1], -1, float("nan")])
def test_recommendations_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(PmpdError, match="temperature must be"):
        Sampling.from_config({"do_sample": True, "temperature": value})
