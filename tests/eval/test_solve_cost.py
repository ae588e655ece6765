"""What a search costs: its decode steps beside one pass over the samples at the highest precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_with_tokenizer

from pmpd.eval.settings import Settings
from pmpd.eval.solve.race import Tolerance
from pmpd.eval.solve.search import SearchSettings, solve
from pmpd.eval.solve.solution import Solution
from pmpd.exporter import ExportConfig, export_bundle
from pmpd.runtime import Bundle

TOKENS = 13  # twelve decode steps: switch points 0, 4, 8 and 12
SAMPLES = 64

Search = Callable[..., Solution]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny random model with two precisions, whose answers have all tokens that they may."""
    folder = tmp_path_factory.mktemp("two-precisions")
    model = save_with_tokenizer(folder / "tiny")
    export_bundle(
        ExportConfig(model=str(model), output=folder / "bundle", precisions=(4, 2), calibration="none", targets=())
    )
    return Bundle.open(folder / "bundle")


@pytest.fixture
def search(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    data = tmp_path / "data.jsonl"
    prompts = [f"The owl saw {number} trees and a ball." for number in range(SAMPLES)]
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")

    def run(tolerance: str, *, early: bool) -> Solution:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{tolerance} {early}"))
        evaluation = Settings(
            task="jsonl", data=data, prompt_template="{prompt}", max_new_tokens=TOKENS, chat=False, threads=1
        )
        return solve(bundle, SearchSettings(evaluation=evaluation, tolerance=Tolerance.parse(tolerance), early=early))

    return run


def passes(solution: Solution) -> float:
    """Return the decode steps of a search over those of one pass at the highest precision."""
    return sum(phase.steps for phase in solution.phases) / (SAMPLES * (TOKENS - 1))


@pytest.mark.parametrize(("tolerance", "best", "limit"), [("40%", "static:4@0,2@8", 2), ("60%", "static:4@0,2@4", 2.5)])
def test_a_search_over_two_precisions_takes_two_passes(search: Search, tolerance: str, best: str, limit: float) -> None:
    exact = search(tolerance, early=False)
    # The high precision, the low one, then both switch points: high for two thirds, low for one, and low for two.
    assert passes(exact) == pytest.approx(1 + 1 + 5 / 3)
    early = search(tolerance, early=True)
    assert str(early.best) == str(exact.best) == best
    assert early.phases[0].race.reference == exact.phases[0].race.reference
    # Samples that the low precision needs to fail on are answered once at it, and their high steps again.
    low, _ = early.phases[0].race.contestants
    assert passes(early) <= min(2 + 5 / 3 * len(low.scores) / SAMPLES, limit)


def test_a_search_that_nothing_passes_takes_less(search: Search) -> None:
    solution = search("0", early=True)
    assert str(solution.best) == "uniform:4"
    assert len(solution.phases[0].race.reference) == SAMPLES
    assert passes(solution) <= 2


def test_a_search_that_the_low_precision_passes_takes_two_passes(search: Search) -> None:
    solution = search("100%", early=True)
    assert str(solution.best) == "uniform:2"
    assert passes(solution) == pytest.approx(2)
