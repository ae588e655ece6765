"""Results: JSON, markdown, the page, and files written in one step."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pmpd.eval.report.page import render_html
from pmpd.eval.report.results import Metric, Results, Row, Sample
from pmpd.runtime import PmpdError
from pmpd.runtime.console.output import write_atomically

EVIL = "<script>alert('x')</script> & [\n 1,\n 2\n]"
METRICS = (Metric("rougeL", "ROUGE-L"), Metric("kl", "KL", higher_is_better=False, digits=3))


def row(schedule: str, bits: tuple[int, ...], rouge: float) -> Row:
    seconds = (0.5, *(bits_now / 1000 for bits_now in bits[1:]))
    sample = Sample(
        source="data.jsonl:1",
        prompt=EVIL,
        output="some words " + EVIL,
        reference=(EVIL,),
        prompt_tokens=10,
        output_tokens=len(bits),
        precisions=bits,
        segments=((bits[0], "some words "), (bits[-1], EVIL)),
        seconds=seconds,
        prefill_seconds=0.5,
        scores={"rougeL": rouge},
    )
    return Row.of(schedule, [sample] * 3, {"rougeL": rouge, "rougeL_stderr": 1.5, "kl": 0.25})


@pytest.fixture
def results() -> Results:
    environment = {
        "cpu": {"model": "Some <CPU>", "flags": "avx2"},
        "threads": 2,
        "bundle": {"name": "demo-pmpd", "architecture": "llama", "parameters": 6_000_000},
        "data": {"name": "data.jsonl", "sha256": "ab"},
        "settings": {"task": "dialogsum"},
        "samples": 3,
    }
    rows = (
        row("fp", (16,) * 8, 30.0),
        row("uniform:4", (4,) * 8, 28.0),
        row("uniform:2", (4, *[2] * 7), 9.0),
        row("static:3@2,2@4", (4, 4, 4, 3, 3, 2, 2, 2), 24.0),
    )
    return Results(rows=rows, metrics=METRICS, environment=environment)


def test_json_has_the_documented_shape(results: Results) -> None:
    document = json.loads(results.to_json())
    assert set(document) == {"rows", "environment", "version"}
    assert document["version"] == 1
    assert [each["schedule"] for each in document["rows"]] == ["fp", "uniform:4", "uniform:2", "static:3@2,2@4"]
    last = document["rows"][-1]
    assert set(last) == {"schedule", "average_bits", "metrics", "prefill_tps", "decode_tps", "samples"}
    assert last["average_bits"] == pytest.approx((4 + 4 + 3 + 3 + 2 + 2 + 2) / 7)
    assert last["metrics"] == {"rougeL": 24.0, "rougeL_stderr": 1.5, "kl": 0.25}
    assert last["prefill_tps"] == pytest.approx(20)
    assert last["decode_tps"] == pytest.approx(1000 / last["average_bits"])
    sample = last["samples"][0]
    assert sample["precisions"] == [4, 4, 4, 3, 3, 2, 2, 2]
    # Lists of numbers are put on one line, texts that look like one are left alone.
    assert (sample["prompt"], sample["reference"]) == (EVIL, [EVIL])
    assert '"precisions": [ 4, 4, 4, 3, 3, 2, 2, 2 ]' in results.to_json()


def test_markdown_lines_up(results: Results) -> None:
    lines = results.to_markdown().splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["schedule", "average bits", "ROUGE-L", "KL", "prefill tokens/s", "decode tokens/s"]
    assert cells[2][:4] == ["fp", "16.00", "30.00 ± 1.50", "0.250"]
    assert set(lines[1]) <= set("|:- ")


def test_what_was_not_measured_is_a_dash(results: Results) -> None:
    unmeasured = Row(
        schedule="fp",
        average_bits=None,
        metrics={"rougeL": 1.0, "kl": 1.0},
        prefill_tps=None,
        decode_tps=None,
        samples=(),
    )
    assert Results(rows=(unmeasured,), metrics=METRICS, environment={}).to_markdown().count("–") == 3


def test_page_is_self_contained(results: Results) -> None:
    page = render_html(results)
    assert page.count("<svg") == 2
    assert not re.search(r"<(script|link|img|iframe|object|embed|image)\b", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"url\((?!#)|@import", page)
    # The namespaces of SVG are names, not addresses; nothing else starts like one.
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_page_escapes_texts(results: Results) -> None:
    page = render_html(results)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Some &lt;CPU&gt;" in page


def test_page_shows_every_row_and_follows_the_theme(results: Results) -> None:
    page = render_html(results)
    for each in results.rows:
        assert f"</i>{each.schedule}</th>" in page
        assert f">{each.schedule}</text>" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#0000?01|#00010\d", page)
    assert "3 bit</text>" in page
    assert '<mark class="bits-0">some words </mark><mark class="bits-1">&lt;' in page


def test_ids_of_the_plots_do_not_clash(results: Results) -> None:
    ids = re.findall(r'\bid="([^"]+)"', render_html(results))
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', render_html(results))
    assert set(used) <= set(ids)


def test_page_without_decode_times_has_no_speed_plot(results: Results) -> None:
    sample = Sample(
        source="x", prompt_tokens=1, output_tokens=2, precisions=(4, 4), prefill_seconds=0.1, scores={"nll": 1.0}
    )
    rows = tuple(Row.of(each, [sample], {"rougeL": 1.0, "kl": 0.0}) for each in ("fp", "uniform:4"))
    page = render_html(Results(rows=rows, metrics=METRICS, environment=results.environment))
    assert page.count("<svg") == 1
    assert "Answers side by side" not in page


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
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]
