"""Results: JSON, markdown, the page, and files written in one step."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pmpd.eval.measure.scoring import Metric, Sample
from pmpd.eval.report.page import render_html
from pmpd.eval.report.plots import _smooth
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.eval.report.verdict import verdict
from pmpd.runtime import PmpdError
from pmpd.runtime.console.output import write_atomically

EVIL = "<script>alert('x')</script> & [\n 1,\n 2\n]"
METRICS = (
    Metric("rougeL", "ROUGE-L", highest=100),
    Metric("kl", "KL", higher_is_better=False, per_step=True, digits=3),
)
BYTES_AT = {4: 4e6, 3: 3e6, 2: 2e6}


def row(name: str, bits: tuple[int, ...], rouge: tuple[float, ...], prefill: float = 0.5) -> QualityRow:
    seconds = (0.5, *(bits_now / 1000 for bits_now in bits[1:]))
    samples = [
        Sample(
            source=f"data.jsonl:{line}",
            prompt=EVIL,
            output="some words " + EVIL,
            reference=(EVIL,),
            prompt_tokens=10,
            output_tokens=len(bits),
            precisions=bits,
            segments=((bits[0], "  some words "), (bits[-1], EVIL)),
            seconds=seconds,
            prefill_seconds=prefill,
            scores={"rougeL": score, "kl": 0.25},
            scored_steps=7,
        )
        for line, score in enumerate(rouge, start=1)
    ]
    if name == "fp":
        return QualityRow.of(name, samples, METRICS)
    return QualityRow.of(name, samples, METRICS, accuracy="int8", bytes_at=BYTES_AT)


@pytest.fixture
def results() -> QualityResults:
    environment = {
        "cpu": {"model": "Some <CPU>", "flags": "avx2"},
        "threads": 2,
        "bundle": {"name": "demo-pmpd", "architecture": "llama", "parameters": 6_000_000},
        "data": {"name": "data.jsonl", "sha256": "ab"},
        "settings": {"task": "dialogsum"},
        "samples": 3,
    }
    rows = (
        row("fp", (16,) * 8, (10.0, 30.0, 50.0)),
        row("uniform:4", (4,) * 8, (11.0, 29.0, 50.0), prefill=0.25),
        row("uniform:2", (4, *[2] * 7), (1.0, 19.0, 40.5), prefill=1.0),
        row("static:3@2,2@4", (4, 4, 4, 3, 3, 2, 2, 2), (9.0, 28.0, 50.0), prefill=0.25),
    )
    return QualityResults(rows=rows, metrics=METRICS, environment=environment)


def test_json_has_the_documented_shape(results: QualityResults) -> None:
    document = json.loads(results.to_json())
    assert set(document) == {"rows", "prefill_tps", "unfinished", "environment", "version"}
    assert (document["version"], document["unfinished"]) == (2, [])
    assert [line["name"] for line in document["rows"]] == ["fp", "uniform:4", "uniform:2", "static:3@2,2@4"]
    last = document["rows"][-1]
    assert set(last) == {"name", "accuracy", "average_bits", "step_bytes", "metrics", "decode_tps", "samples"}
    assert last["average_bits"] == pytest.approx((4 + 4 + 3 + 3 + 2 + 2 + 2) / 7)
    assert last["step_bytes"] == pytest.approx(1e6 * last["average_bits"])
    assert last["metrics"]["rougeL"] == {"value": pytest.approx(29), "ci95": pytest.approx(51.0, rel=0.01), "count": 3}
    assert last["metrics"]["kl"] == {"value": 0.25, "ci95": 0, "count": 3}
    assert last["decode_tps"]["value"] == pytest.approx(1000 / last["average_bits"])
    sample = last["samples"][0]
    assert sample["precisions"] == [4, 4, 4, 3, 3, 2, 2, 2]
    # Lists of numbers are put on one line, texts that look like one are left alone.
    assert (sample["prompt"], sample["reference"]) == (EVIL, [EVIL])
    assert '"precisions": [ 4, 4, 4, 3, 3, 2, 2, 2 ]' in results.to_json()


def test_markdown_lines_up(results: QualityResults) -> None:
    lines = [line for line in results.to_markdown().splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "schedule", "average bits", "MB/token", "ROUGE-L (3 answers)", "KL (21 steps)", "decode tokens/s",
    ]  # fmt: skip
    assert cells[2] == ["fp", "16.00", "–", "30.00 ± 49.65", "0.250", "–"]
    assert cells[4][:3] == ["uniform:2", "2.00", "2.0"]
    assert set(lines[1]) <= set("|:- ")


def test_the_table_says_what_its_numbers_are(results: QualityResults) -> None:
    text = results.to_markdown()
    assert "± is half the width of a 95 % confidence interval over answers" in text
    assert "of the decoder's linear layers" in text
    assert "the step that ends it do not count" in text


def test_prefill_is_one_figure_for_all_schedules(results: QualityResults) -> None:
    """All of them run the same graph: 90 tokens in 3 * (0.25 + 1 + 0.25) seconds; the fp model's is apart."""
    assert results.prefill_tps.keys() == {"fp", "int8"}
    assert results.prefill_tps["int8"].value == pytest.approx(90 / 4.5)
    text = results.to_markdown()
    assert "Prompts, unless a schedule says prefill: 20.0 ± " in text
    assert text.count("refill tokens/s") == 0


def test_verdict_in_plain_words(results: QualityResults) -> None:
    four, two, mixed = verdict(results)
    assert four.startswith("uniform:4 (4.00 bits): ROUGE-L +0.00 ± 2.48 against fp (within noise).")
    assert two.startswith("uniform:2 (2.00 bits): ROUGE-L -9.83 ± ")
    assert "against fp (worse); -9.83 ± " in two
    assert "decodes 2.00 ± 0.00 times as fast." in two
    assert "against uniform:4 (within noise); decodes 1.40 ± 0.00 times" in mixed
    assert results.to_markdown().splitlines()[:3] == [four, two, mixed]
    assert two in render_html(results)


def test_one_answer_gives_no_judgement(results: QualityResults) -> None:
    rows = tuple(
        QualityRow.of(full.name, full.samples[:1], METRICS, accuracy=full.accuracy, bytes_at=full.accuracy and BYTES_AT)
        for full in results.rows
    )
    few = QualityResults(rows=rows, metrics=METRICS, environment=results.environment)
    assert "uniform:2 (2.00 bits): ROUGE-L -9.00 against fp (one answer only: noise unknown)" in few.to_markdown()


def test_bold_is_the_best_beyond_noise(results: QualityResults) -> None:
    page = render_html(results)
    # uniform:4 is first, static differs from it within noise, uniform:2 does not; KL is the same for all.
    assert re.findall(r"<b>([^<]+)</b>", page) == ["30.00", "29.00"]


def test_what_was_not_measured_is_a_dash(results: QualityResults) -> None:
    sample = Sample(
        source="x",
        prompt_tokens=1,
        output_tokens=1,
        precisions=(4,),
        prefill_seconds=0.0,
        scores={"rougeL": 1.0, "kl": 0.0},
        scored_steps=1,
    )
    rows = tuple(QualityRow.of(name, [sample], METRICS) for name in ("fp", "uniform:4"))
    lines = QualityResults(rows=rows, metrics=METRICS, environment={}).to_markdown().splitlines()
    assert [line.count("–") for line in lines if line.startswith(("| fp", "| uniform"))] == [3, 3]


def test_page_is_self_contained(results: QualityResults) -> None:
    page = render_html(results)
    assert page.count("<svg") == 4  # a plot per metric, and speed for wide and for narrow screens
    assert not re.search(r"<(script|link|img|iframe|object|embed|image)\b", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"url\((?!#)|@import", page)
    # The namespaces of SVG are names, not addresses; nothing else starts like one.
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_page_escapes_texts(results: QualityResults) -> None:
    page = render_html(results)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Some &lt;CPU&gt;" in page


def test_page_shows_every_row_and_follows_the_theme(results: QualityResults) -> None:
    page = render_html(results)
    for shown in results.rows:
        assert f"</i>{shown.name}</th>" in page
        assert f">{shown.name}</text>" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#0000?01|#00010\d", page)
    assert "3 bits</text>" in page
    assert '<mark class="shade-blue">some words </mark><mark class="shade-red">&lt;' in page


def test_ids_of_the_plots_do_not_clash(results: QualityResults) -> None:
    ids = re.findall(r'\bid="([^"]+)"', render_html(results))
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', render_html(results))
    assert set(used) <= set(ids)


def test_page_without_decode_times_has_no_speed_plot(results: QualityResults) -> None:
    sample = Sample(
        source="x",
        prompt_tokens=1,
        output_tokens=2,
        precisions=(4, 4),
        prefill_seconds=0.1,
        scores={"rougeL": 1.0, "kl": 0.0},
        scored_steps=1,
    )
    rows = tuple(QualityRow.of(name, [sample], METRICS) for name in ("fp", "uniform:4"))
    page = render_html(QualityResults(rows=rows, metrics=METRICS, environment=results.environment))
    assert page.count("<svg") == 2
    assert "Answers side by side" not in page


def test_a_switch_stays_sharp() -> None:
    """Speeds are smoothed among steps of one precision only, over as many of them as there are, nine at most."""
    seconds, bits = [4.0] * 12 + [2.0] * 3, [4] * 12 + [2] * 3
    assert _smooth(seconds, bits) == seconds
    assert _smooth([9.0, 0.0, 0.0, 5.0], [4, 4, 4, 2]) == [3.0, 3.0, 3.0, 5.0]


def test_no_axis_shows_what_a_metric_cannot_be(results: QualityResults) -> None:
    page = render_html(results)
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in re.findall(r">([\N{MINUS SIGN}]?\d+)</text>", page)]
    assert min(ticks) >= 0
    assert max(ticks) <= 1000 / 2


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


def test_both_passes_of_a_step_are_paid_for_and_the_second_one_is_its_precision() -> None:
    high, static, low = row("uniform:4", (4, 4, 4), (50.0,)), row("static:3@1", (4, 4, 3), (40.0,)), (4, 2, 2)
    (sample,) = row("repeat:2,4@1", (4, 2, 4), (45.0,)).samples
    repeat = QualityRow.of(
        "repeat:2,4@1", [replace(sample, first_passes={2: 2})], METRICS, accuracy="int8", bytes_at=BYTES_AT
    )
    assert repeat.average_bits == (2 + 2 + 4) / 2
    assert repeat.step_bytes == (2e6 + 2e6 + 4e6) / 2
    assert repeat.token_bits == 3
    always = QualityRow.of(
        "repeat:2,4@9", [replace(sample, precisions=(4, 4, 4), first_passes={1: 2, 2: 2})], METRICS, accuracy="int8"
    )
    assert always.average_bits == 6
    rows = (row("fp", (32, 32, 32), (60.0,)), always, repeat, static, row("uniform:2", low, (30.0,)), high)
    results = QualityResults(rows=rows, metrics=METRICS, environment={})
    assert all(results.high(other) is high for other in rows[1:])  # what is compared with is not what costs most
    document = json.loads(results.to_json())
    assert document["rows"][2]["samples"][0]["first_passes"] == {"2": 2}
