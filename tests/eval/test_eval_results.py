"""Results: JSON, markdown, and files written in one step."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.metrics.registry import METRICS as ALL_METRICS
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.metrics.texts import TextScorer
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.runtime import PmpdError
from pmpd.runtime.console.output import write_atomically

EVIL = "<script>alert('x')</script> & [\n 1,\n 2\n]"
METRICS = tuple(ALL_METRICS[name] for name in ("rougeL", "kl_divergence"))
BYTES_AT = {4: 4e6, 3: 3e6, 2: 2e6}


def turn_of(bits: tuple[float, ...], first_passes: dict[int, float] | None = None) -> Turn:
    """Return an answer that begins with a space, and whose last segment has markup in it."""
    runs = [(precision, len(list(run))) for precision, run in groupby(bits)]
    texts = ["  some words ", *[""] * (len(runs) - 2), EVIL] if len(runs) > 1 else ["  some words " + EVIL]
    segments = tuple((*run, text) for run, text in zip(runs, texts, strict=True))
    return Turn(prompt_tokens=10, segments=segments, first_passes=first_passes or {}, ids=tuple(range(len(bits))))


def row(name: str, bits: tuple[float, ...], rouge: tuple[float, ...]) -> QualityRow:
    samples = [
        Sample(
            source=f"data.jsonl:{line}",
            group=f"data.jsonl:{line}",
            prompt=EVIL,
            reference=(EVIL,),
            turns=(turn_of(bits),),
            scores={"rougeL": score, "kl_divergence": 0.25},
            scored_steps=7,
        )
        for line, score in enumerate(rouge, start=1)
    ]
    if name == "fp":
        return QualityRow.of(name, samples, METRICS)
    return QualityRow.of(name, samples, METRICS, accuracy="int8", bytes_at=BYTES_AT)


def timed(row: QualityRow) -> QualityRow:
    """Return a row whose steps take a millisecond a bit, in each of three repetitions."""
    seconds = tuple(bits / 1000 for bits in row.samples[0].turns[0].precisions[1:])
    return replace(row, decode_tps=Estimate(len(seconds) / sum(seconds), 0.0, 3), step_seconds=seconds)


@pytest.fixture
def untimed() -> QualityResults:
    environment = {
        "cpu": {"model": "Some <CPU>", "flags": "avx2"},
        "threads": 2,
        "bundle": {"name": "demo-pmpd", "architecture": "llama", "parameters": 6_000_000},
        "data": {"name": "data.jsonl", "sha256": "ab", "skipped": 1},
        "settings": {"task": "dialogsum"},
        "samples": 3,
    }
    rows = (
        row("fp", (16,) * 8, (10.0, 30.0, 50.0)),
        row("uniform:4", (4,) * 8, (11.0, 29.0, 50.0)),
        row("uniform:2", (4, *[2] * 7), (1.0, 19.0, 40.5)),
        row("static:3@2,2@4", (4, 4, 4, 3, 3, 2, 2, 2), (9.0, 28.0, 50.0)),
    )
    return QualityResults(rows=rows, metrics=METRICS, environment=environment)


@pytest.fixture
def results(untimed: QualityResults) -> QualityResults:
    rows = (untimed.rows[0], *map(timed, untimed.schedules))
    return replace(untimed, rows=rows, prefill_tps={"int8": Estimate(20.0, 1.0, 3)})


def test_json_has_the_documented_shape(results: QualityResults) -> None:
    document = json.loads(results.to_json())
    assert set(document) == {"rows", "metrics", "prefill_tps", "verdict", "environment", "version"}
    assert (document["version"], document["metrics"]) == (3, ["rougeL", "kl_divergence"])
    assert set(document["verdict"]) == {"recommended", "reason", "caution"}
    assert document["verdict"]["recommended"] == "static:3@2,2@4"
    assert [line["name"] for line in document["rows"]] == ["fp", "uniform:4", "uniform:2", "static:3@2,2@4"]
    fp, high, low, last = document["rows"]
    assert set(last) == {
        "name", "accuracy", "average_bits", "step_bytes", "metrics", "differences", "decode_tps", "step_seconds",
        "samples",
    }  # fmt: skip
    assert last["average_bits"] == pytest.approx((4 + 4 + 3 + 3 + 2 + 2 + 2) / 7)
    assert last["step_bytes"] == pytest.approx(1e6 * last["average_bits"])
    assert last["metrics"]["rougeL"] == asdict(METRICS[0].estimate(results.rows[-1].samples))
    assert last["metrics"]["kl_divergence"] == {"value": 0.25, "ci95": 0, "count": 3}
    assert last["decode_tps"]["value"] == pytest.approx(1000 / last["average_bits"])
    assert fp["differences"]["rougeL"] == {"fp": None, "high": None}
    assert high["differences"]["rougeL"] == {
        "fp": {"value": 0, "ci95": pytest.approx(2.2, abs=0.6), "count": 3},
        "high": None,
    }
    assert low["differences"]["rougeL"]["high"]["value"] == pytest.approx(-9.83, abs=0.01)
    sample = last["samples"][0]
    assert sample["turns"][0]["segments"] == [[4, 3, "  some words "], [3, 2, ""], [2, 3, EVIL]]
    # Lists of numbers are put on one line, texts that look like one are left alone.
    assert (sample["prompt"], sample["reference"]) == (EVIL, [EVIL])
    assert '"ids": [ 0, 1, 2, 3, 4, 5, 6, 7 ]' in results.to_json()


def test_json_without_texts_has_nothing_of_the_data(results: QualityResults) -> None:
    text = results.to_json(texts=False)
    for line in json.loads(text)["rows"]:
        for sample in line["samples"]:
            assert not {"prompt", "reference"} & sample.keys()
    secret = tuple(
        replace(each, samples=tuple(replace(s, prompt="SECRET", reference=("SECRET",)) for s in each.samples))
        for each in results.rows
    )
    hidden = replace(results, rows=secret)
    assert "SECRET" in hidden.to_json()
    assert "SECRET" not in hidden.to_json(texts=False)


def test_json_is_read_again(results: QualityResults, tmp_path: Path) -> None:
    repeat = QualityRow.of(
        "repeat:2,4@1",
        [replace(s, turns=(turn_of((4, 2, 4), {2: 2}), turn_of((4,)))) for s in results.rows[1].samples],
        METRICS,
        accuracy="int8",
    )
    results = replace(results, rows=(*results.rows, repeat))
    file = tmp_path / "r.json"
    file.write_text(results.to_json(), encoding="utf-8")
    again = QualityResults.from_json(file)
    assert again.rows == results.rows
    assert (again.metrics, again.prefill_tps) == (results.metrics, results.prefill_tps)
    assert again.to_json() == results.to_json()
    assert again.to_markdown() == results.to_markdown()
    file.write_text(results.to_json(texts=False), encoding="utf-8")
    bare = QualityResults.from_json(file)
    assert bare.to_markdown() == results.to_markdown()
    sample = results.rows[1].samples[0]
    turns = tuple(replace(turn, ids=()) for turn in sample.turns)
    assert bare.rows[1].samples[0] == replace(sample, prompt="", reference=(), turns=turns)


def test_counts_are_read_again(results: QualityResults, tmp_path: Path) -> None:
    scorer = TextScorer(["bleu"])
    rows = tuple(
        QualityRow.of(each.name, [scorer.scored(sample) for sample in each.samples], scorer.metrics)
        for each in results.rows
    )
    whole = replace(results, rows=rows, metrics=scorer.metrics)
    file = tmp_path / "r.json"
    file.write_text(whole.to_json(texts=False), encoding="utf-8")
    again = QualityResults.from_json(file)
    assert again.rows[1].metrics["bleu"].value > 0
    assert again.metrics[0].estimate(again.rows[1].samples) == whole.rows[1].metrics["bleu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is of version 2, and this is version 3: measure it again"),
        ({"version": None}, "is of version None"),
        ({"metrics": ["rougeX"]}, r"is damaged \(KeyError\('rougeX'\)\): measure it again"),
        ({"rows": [{}]}, "is damaged"),
        ({"rows": 3}, "is damaged"),
        ({"prefill_tps": None}, "is damaged"),
        (
            {"rows": [{"name": "fp", "accuracy": None, "average_bits": 1, "step_bytes": 1, "metrics": {"rougeL": []}}]},
            "is damaged",
        ),
    ],
)
def test_a_file_of_something_else_is_one_line(
    results: QualityResults, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(json.loads(results.to_json()) | change), encoding="utf-8")
    with pytest.raises(PmpdError, match=message) as caught:
        QualityResults.from_json(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it is not JSON"),
        (b'{"rows": [], "envir', "cannot be read: it is not JSON"),
        (b"\xff\xfe", "cannot be read: it is not JSON"),
        (b"[]", "is not a result of pmpd-eval quality: give a file that its --json wrote"),
        (b'{"rows": [], "version": 3}', "is not a result of pmpd-eval"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PmpdError, match=message):
        QualityResults.from_json(file)


def test_markdown_lines_up(results: QualityResults) -> None:
    lines = [line for line in results.to_markdown().splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "schedule", "average bits", "MB/token", "ROUGE-L (3 answers)", "to fp", "to high",
        "KL divergence (nats) (21 tokens)", "decode tokens/s",
    ]  # fmt: skip
    rouge = METRICS[0].estimate(results.rows[0].samples).text(2)
    assert cells[2] == ["fp", "16.00", "–", rouge, "–", "–", "0.2500", "–"]
    assert cells[3][4].startswith("+0.00 ± ")
    assert cells[3][5] == "–"
    assert cells[4][:3] == ["uniform:2", "2.00", "2.0"]
    assert cells[4][4].startswith("-9.83 ± ")
    assert cells[4][5].startswith("-9.83 ± ")
    assert cells[4][7] == "500.0"
    assert set(lines[1]) <= set("|:- ")


def test_without_speed_there_is_no_column_of_it(untimed: QualityResults) -> None:
    assert "tokens/s" not in untimed.to_markdown()
    assert "times as fast" not in untimed.to_markdown()


def test_the_table_says_what_its_numbers_are(results: QualityResults) -> None:
    text = results.to_markdown()
    assert "3 samples; 1 skipped. ± is half the width of a 95 % confidence interval, by bootstrap." in text
    assert "to high: to uniform:4." in text
    assert "of the decoder's linear layers" in text
    assert "the step that ends it do not count" in text
    assert "Prompts, unless a schedule says prefill: 20.0 ± 1.0 tokens/s." in text


def test_the_table_says_how_many_documents_there_are(results: QualityResults) -> None:
    rows = tuple(
        replace(each, samples=(*(replace(s, group="a") for s in each.samples[:2]), each.samples[2]))
        for each in results.rows
    )
    assert "3 samples of 2 documents, which are what is drawn; 1 skipped." in replace(results, rows=rows).to_markdown()


def bare(results: QualityResults, bits: tuple[float, ...]) -> QualityResults:
    """Return results of one sample a row, without prompts and speed."""
    turn = Turn(prompt_tokens=1, segments=tuple((b, 1, "") for b in bits))
    sample = Sample(source="x", turns=(turn,), scores={"rougeL": 1.0, "kl_divergence": 0.0}, scored_steps=1)
    rows = tuple(QualityRow.of(name, [sample], METRICS) for name in ("fp", "uniform:4"))
    return QualityResults(rows=rows, metrics=METRICS, environment=results.environment)


def test_what_was_not_measured_is_a_dash(results: QualityResults) -> None:
    lines = bare(results, (4,)).to_markdown().splitlines()
    assert [line.count("–") for line in lines if line.startswith(("| fp", "| uniform"))] == [4, 3]


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.json"
    write_atomically(file, "old")
    write_atomically(file, "new ü")
    assert file.read_text(encoding="utf-8") == "new ü"

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PmpdError, match=r"cannot write .*r\.json \(No space left on device\)"):
        write_atomically(file, "newer")
    assert file.read_text(encoding="utf-8") == "new ü"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_both_passes_of_a_step_are_paid_for_and_the_second_one_is_its_precision(results: QualityResults) -> None:
    high, static, low = row("uniform:4", (4, 4, 4), (50.0,)), row("static:3@1", (4, 4, 3), (40.0,)), (4, 2, 2)
    (sample,) = row("repeat:2,4@1", (4, 2, 4), (45.0,)).samples

    def repeated(name: str, turn: Turn) -> QualityRow:
        return QualityRow.of(name, [replace(sample, turns=(turn,))], METRICS, accuracy="int8", bytes_at=BYTES_AT)

    repeat = repeated("repeat:2,4@1", turn_of((4, 2, 4), {2: 2}))
    assert repeat.average_bits == (2 + 2 + 4) / 2
    assert repeat.step_bytes == (2e6 + 2e6 + 4e6) / 2
    assert repeat.token_bits == 3
    always = repeated("repeat:2,4@9", turn_of((4, 4, 4), {1: 2, 2: 2}))
    assert always.average_bits == 6
    rows = (row("fp", (32, 32, 32), (60.0,)), always, repeat, static, row("uniform:2", low, (30.0,)), high)
    several = replace(results, rows=rows)
    assert all(several.high(other) is high for other in rows[1:])  # what is compared with is not what costs most
    document = json.loads(several.to_json())
    assert document["rows"][2]["samples"][0]["turns"][0]["first_passes"] == {"2": 2}
