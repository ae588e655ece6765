"""`pmpd-eval compare`: two results files, paired by sample."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from made_results import made_results

from pmpd.eval.cli import main
from pmpd.eval.metrics.registry import METRICS
from pmpd.eval.report.compare import compare_results, parse_pair
from pmpd.eval.report.results import QualityResults
from pmpd.runtime import PmpdError

SCORES = (30.0, 10.0, 50.0, 20.0, 40.0)


def shifted(by: float) -> tuple[float, ...]:
    return tuple(score + by for score in SCORES)


def changed(results: QualityResults, room: str, **values: Any) -> QualityResults:
    """Return results with other values in a part of their environment."""
    environment = {**results.environment, room: {**results.environment[room], **values}}
    return replace(results, environment=environment)


def test_rows_of_one_name_are_paired_by_sample() -> None:
    a = made_results({"fp": SCORES, "uniform:4": SCORES, "uniform:2": SCORES})
    b = made_results({"fp": SCORES, "uniform:4": shifted(2), "static:4@0,2@3": SCORES})
    # The samples of B are others and in another order: pairing is by where they come from.
    kept = [replace(row, samples=row.samples[:0:-1]) for row in b.rows]
    comparison = compare_results(a, replace(b, rows=tuple(kept)))
    assert [(change.row_a, change.row_b) for change in comparison.changes] == [("fp", "fp"), ("uniform:4", "uniform:4")]
    _, change = comparison.changes
    assert (change.samples, change.samples_a, change.samples_b) == (4, 5, 4)
    assert change.a.value == pytest.approx(30)  # over the samples that both have
    assert change.b.value == pytest.approx(32)
    # Each sample gained 2: paired, there is no noise in it.
    assert (change.difference.value, change.difference.ci95) == (pytest.approx(2), pytest.approx(0))
    assert change.a.ci95 is not None
    assert change.a.ci95 > 1


def test_any_two_rows_can_be_paired_within_one_file() -> None:
    results = made_results({"fp": SCORES, "uniform:4": SCORES, "static:4@0,2@3": shifted(-1)})
    comparison = compare_results(results, results, [parse_pair("uniform:4=static:4@0,2@3")])
    (change,) = comparison.changes
    assert (change.row, change.difference.value) == ("uniform:4 → static:4@0,2@3", pytest.approx(-1))
    assert change.difference == results.to_high(results.metrics[0], results.rows[2])
    assert comparison.differing == {}


def test_the_data_may_have_another_name() -> None:
    a = made_results({"uniform:4": SCORES})
    samples = [replace(s, source=s.source.replace("data", "copy"), group=s.source.replace("data", "copy"))
               for s in a.rows[0].samples]  # fmt: skip
    b = changed(replace(a, rows=(replace(a.rows[0], samples=tuple(samples)),)), "data", name="copy.jsonl")
    assert compare_results(a, b).changes[0].samples == 5


def test_what_else_differs_is_said() -> None:
    a = made_results({"uniform:4": SCORES}, settings={"max_new_tokens": 8, "limit": 5})
    b = changed(
        made_results({"uniform:4": SCORES}, settings={"max_new_tokens": 9, "limit": 5}), "bundle", sha256="d" * 64
    )
    comparison = compare_results(a, b)
    assert comparison.differing == {
        "bundle.sha256": ("b" * 64, "d" * 64),
        "settings.max_new_tokens": ("8", "9"),
    }
    assert "bundle.sha256: bbbbbbbbbbbb… in A, dddddddddddd… in B" in comparison.to_markdown()


def test_texts_match_where_as_many_of_their_tokens_were_scored() -> None:
    a = made_results({"uniform:4": SCORES}, metrics=("perplexity",))
    given = [replace(s, turns=(replace(s.turns[0], ids=()),)) for s in a.rows[0].samples]
    a = replace(a, rows=(replace(a.rows[0], samples=tuple(given)),))
    longer = (replace(given[0], scored_steps=8), *given[1:])
    b = replace(a, rows=(replace(a.rows[0], samples=longer),))
    assert compare_results(a, b).changes[0].samples == 4


def refusal(a: QualityResults, b: QualityResults, *pairs: str) -> str:
    with pytest.raises(PmpdError) as failure:
        compare_results(a, b, [parse_pair(pair) for pair in pairs])
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_what_cannot_be_compared_is_refused() -> None:
    a = made_results({"fp": SCORES, "uniform:4": SCORES})
    assert "A is of the task dialogsum and B of iwslt" in refusal(a, changed(a, "settings", task="iwslt"))
    assert "A is of data.jsonl (SHA-256 aaaaaaaaaaaa…) and B of data.jsonl (SHA-256 eeeeeeeeeeee…)" in refusal(
        a, changed(a, "data", sha256="e" * 64)
    )
    assert "A (rougeL) and B (bleu) have no metric in common" in refusal(a, replace(a, metrics=(METRICS["bleu"],)))
    other = replace(a, rows=(replace(a.rows[1], name="uniform:3"),))
    assert "A (fp, uniform:4) and B (uniform:3) have no row in common: pair rows with --row A=B" in refusal(a, other)
    assert "unknown row of B 'uniform:2': choose one of uniform:4, fp" in refusal(a, a, "fp=uniform:2")
    for text in ("uniform:4", "=uniform:4", "uniform:4="):
        assert "is not of the form A=B" in refusal(a, a, text)


def test_no_sample_in_common_says_how_the_runs_differ() -> None:
    a = made_results({"uniform:4": SCORES}, settings={"limit": 5, "max_new_tokens": 8})
    elsewhere = [replace(sample, source="data.jsonl:99") for sample in a.rows[0].samples]
    b = changed(replace(a, rows=(replace(a.rows[0], samples=tuple(elsewhere)),)), "settings", limit=7)
    message = refusal(a, b)
    assert "no sample is in both" in message
    assert "limit 5, max_new_tokens 8" in message
    assert "limit 7, max_new_tokens 8" in message


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command_prints_and_writes_the_table(tmp_path: Path) -> None:
    a, b, document, table = (tmp_path / name for name in ("a.json", "b.json", "out.json", "out.csv"))
    scores = {"fp": SCORES, "uniform:4": SCORES}
    a.write_text(made_results(scores, metrics=("rougeL", "rouge1")).to_json(), encoding="utf-8")
    b.write_text(made_results({**scores, "uniform:4": shifted(-3)}).to_json(texts=False), encoding="utf-8")
    result = run(a, b, "--json", document, "--csv", table, "-q")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("| uniform:4")]
    (cells,) = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[1:3] == ["ROUGE-L ↑", "5 of 5"]
    assert cells[-2].startswith("-3.00")
    assert cells[-1] == "worse"
    changes = json.loads(document.read_text(encoding="utf-8"))["changes"]
    assert [(change["row_a"], change["metric"]) for change in changes] == [("fp", "rougeL"), ("uniform:4", "rougeL")]
    assert changes[1]["difference"]["value"] == pytest.approx(-3)
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert [float(row["difference"]) for row in rows] == [0, pytest.approx(-3)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"version": 2, "rows": [], "prefill_tps": {}, "environment": {}}', "is of version 2, and this is version 3"),
        ('{"version": 3, "rows": [], "ratios": [], "environment": {}}', "is not a result of pmpd-eval quality"),
        ("[]", "is not a result of pmpd-eval quality"),
        ("no JSON", "cannot be read: it is not JSON"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str, reason: str) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(made_results({"uniform:4": SCORES}).to_json(), encoding="utf-8")
    bad.write_text(content, encoding="utf-8")
    result = run(good, bad)
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert f"{bad} {reason}" in result.output
