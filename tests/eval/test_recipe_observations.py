"""The paper's two observations, measured on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pmpd.eval.recipes.observations import HALVES, main, observe
from pmpd.eval.runner import Settings
from pmpd.runtime import Bundle, PmpdError

ROWS = [
    "4, 4",
    "4, 2",
    "2, 4",
    "2, 2",
    "4, 4 in the first half",
    "4, 4 in the middle half",
    "4, 4 in the last half",
    "4, 4 in every other step",
    "4, 4 in the random half",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = ["Once upon a time, there was a little girl named", "Tom had a red ball. He", "One day, a bird"]
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"start": t, "end": "the end"}) + "\n" for t in texts), encoding="utf-8")
    return file


def settings(data: Path, **options: object) -> Settings:
    return Settings(
        **{"task": "jsonl", "data": data, "prompt_template": "{start}", "max_new_tokens": 10, "threads": 1} | options  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("steps", range(12))
def test_all_halves_have_as_many_steps(steps: int) -> None:
    count = (steps + 1) // 2
    for chosen in HALVES.values():
        assert len(set(chosen(steps, count)) & set(range(steps))) == count


def test_each_row_shares_out_the_same_bits(demo_bundle: Path, data: Path) -> None:
    found = observe(Bundle.open(demo_bundle), settings(data, reference_field="end"), high=4, low=2)
    assert list(found.to_high) == list(found.to_reference) == list(found.bits) == ROWS
    assert found.to_high["4, 4"] == [100] * 3
    assert (found.bits["4, 2"], found.bits["2, 4"]) == (2, 4)
    assert all(found.bits[row] == pytest.approx((5 * 4 + 4 * 2) / 9) for row in ROWS[4:])
    assert 0 < min(map(min, found.to_high.values())) < 100
    assert observe(Bundle.open(demo_bundle), settings(data, reference_field="end"), high=4, low=2) == found


def test_the_command_prints_a_table(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    words = [demo_bundle, "--task", "jsonl", "--data", data, "--prompt-template", "{start}", "--max-new-tokens", 4]
    result = CliRunner().invoke(main, [str(word) for word in (*words, "--json", report, "-q")])
    assert result.exit_code == 0, result.stderr
    lines = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("|")][2:]
    assert lines == [row.replace("4", "3") for row in ROWS]
    assert "3 samples; ± is half" in result.stdout
    assert json.loads(report.read_text(encoding="utf-8"))["high"] == 3


def test_answers_of_one_token(demo_bundle: Path, data: Path) -> None:
    found = observe(Bundle.open(demo_bundle), settings(data, max_new_tokens=1), high=4, low=2)
    assert set(found.bits.values()) == {0}
    assert found.to_reference == {}


@pytest.mark.parametrize(
    ("high", "low", "options", "message"),
    [
        (4, 4, {}, "must be above the low one, got 4 and 4"),
        (5, 4, {}, "unknown precision '5': choose one of 4, 3, 2"),
        (4, 2, {"task": "perplexity", "prompt_template": None}, "the task perplexity gives no answers"),
    ],
)
def test_mistakes(
    demo_bundle: Path, data: Path, high: float, low: float, options: dict[str, object], message: str
) -> None:
    with pytest.raises(PmpdError, match=message):
        observe(Bundle.open(demo_bundle), settings(data, **options), high=high, low=low)
