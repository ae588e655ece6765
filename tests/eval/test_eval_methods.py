"""Quantization methods compared on a checkpoint, without bundles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pmpd.eval.comparison.methods import Choice, MethodScores, main, table
from pmpd.runtime import PmpdError


@pytest.mark.full
def test_fewer_bits_are_further_from_the_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a girl with a red ball and a small dog named Max. " * 80)
    file = tmp_path / "scores.json"
    methods = ["--method", "anyprecision", "--method", "anyprecision:seed=4"]
    result = CliRunner().invoke(
        main, ["demo", "--data", str(text), "--limit", "2", "--precisions", "8,3", *methods, "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    fp, *rows = [MethodScores(**row) for row in json.loads(file.read_text())]
    assert [(row.method, row.precision) for row in rows] == [
        ("anyprecision", 8), ("anyprecision", 3), ("anyprecision:seed=4", 8), ("anyprecision:seed=4", 3)
    ]  # fmt: skip
    assert fp.method == "fp"
    assert max(map(abs, fp.kl)) < 1e-4
    assert min(fp.top1) > 0.99
    eight, three, _, other_seed = rows
    assert all(a < 0.01 < b for a, b in zip(eight.kl, three.kl, strict=True))
    assert three.kl != other_seed.kl  # the option counts
    lines = table([fp, *rows]).splitlines()
    assert len(lines) == 9
    assert lines[3].startswith("| anyprecision | 8 |")


def test_a_ratio_has_the_interval_of_paired_differences() -> None:
    fp = MethodScores("fp", 0, [0.0, 0.0], [2.0, 3.0], [1.0, 1.0], 0.0)
    one = MethodScores("one", 4, [0.1, 0.3], [2.1, 3.1], [0.9, 0.9], 1.0)
    other = MethodScores("other", 4, [0.05, 0.27], [2.1, 3.1], [0.9, 0.9], 1.0)
    assert "| other | 4 | 0.1600 ± 1.3981 | 0.800 ± 0.636 |" in table([fp, one, other])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("squash", "unknown method 'squash'"),
        ("guided:damping", "'damping' is no option: write name=value"),
        ("guided:damping=a b", "'damping=a b' is no option: write name=value"),
    ],
)
def test_choices_that_are_none(text: str, message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        Choice.parse(text)


def test_a_choice_reads_as_it_is_written() -> None:
    choice = Choice.parse("guided:damping=0.3;rounds=1")
    assert choice.options == {"damping": 0.3, "rounds": 1}
    assert str(choice) == "guided:damping=0.3;rounds=1"
