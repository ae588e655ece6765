"""The verdict and the page that shows it: what is recommended, what is not excluded, and that all of it is there."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from itertools import combinations

import matplotlib
import pytest
from made_results import made_results
from matplotlib.figure import Figure

from pmpd.eval.cli import quality
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.report.page import SHOWN_SAMPLES, render_html
from pmpd.eval.report.plots import _STYLE, _draw_quality, _label_points, _lines, _smooth, row_colors
from pmpd.eval.report.repeat import repeat_command
from pmpd.eval.report.results import QualityResults
from pmpd.eval.report.verdict import judgement, verdict

EVIL = "<script>alert('x')</script> & [\n 1,\n 2\n]"
FP = (30.0, 10.0, 50.0, 20.0, 40.0, 30.0)
NOISE = (0.4, -0.4, 0.2, -0.2, 0.1, -0.1)


def near(values: tuple[float, ...], by: float = 0.0) -> tuple[float, ...]:
    """Return values that are off by a mean of `by`, with some noise."""
    return tuple(value + by + noise for value, noise in zip(values, NOISE, strict=True))


@pytest.fixture(scope="module")
def results() -> QualityResults:
    return made_results(
        {
            "fp": FP,
            "uniform:4": near(FP, 0.1),
            "uniform:2": near(FP, -5),
            "static:4@0,2@3": tuple(score - 0.1 - 2 * noise for score, noise in zip(FP, NOISE, strict=True)),
        },
        metrics=("rougeL", "rouge1"),
        text=EVIL,
    )


@pytest.fixture(scope="module")
def page(results: QualityResults) -> str:
    return render_html(results)


def test_the_fewest_bits_that_are_not_shown_to_be_worse_are_recommended(results: QualityResults) -> None:
    conclusion = verdict(results)
    assert conclusion.row is results.rows[3]
    assert conclusion.title == "Recommended: static:4@0,2@3"
    # 3 steps read 4 bits and 4 read 2; these make as many MB as bits.
    assert conclusion.reason.startswith("2.86 bits, 29 % fewer bytes a token than uniform:4; ROUGE-L -0.20 ± ")
    assert re.search(r" against uniform:4, -0\.10 ± \d\.\d\d against fp\.$", conclusion.reason)


def test_a_loss_that_is_not_excluded_is_named() -> None:
    conclusion = verdict(made_results({"fp": FP, "uniform:4": FP, "uniform:2": near(FP)}))
    assert conclusion.row is not None
    assert conclusion.row.name == "uniform:2"
    assert "6 samples show no loss beyond noise" in conclusion.caution
    (gap,) = re.findall(r"up to (\S+) against uniform:4", conclusion.caution)
    assert 0.1 < float(gap) < 1


def test_a_schedule_that_is_worse_than_fp_alone_is_not_recommended() -> None:
    """Its difference to the most bits is noise, that to fp is not."""
    wide = tuple(value + 9 * noise - 0.5 for value, noise in zip(FP, NOISE, strict=True))
    results = made_results({"fp": FP, "uniform:4": wide, "uniform:2": tuple(value - 1 for value in FP)})
    metric = results.metrics[0]
    assert judgement(results, metric, results.rows[1]) == "no difference shown"
    assert judgement(results, metric, results.rows[2]) == "worse than fp"
    conclusion = verdict(results)
    assert conclusion.row is results.rows[1]
    assert "Every schedule with fewer bits is worse." in conclusion.reason


def test_where_the_most_bits_are_worse_than_fp_they_are_what_counts() -> None:
    below = tuple(value - 1 for value in FP)
    results = made_results({"fp": FP, "uniform:4": below, "uniform:2": near(below)})
    conclusion = verdict(results)
    assert conclusion.row is results.rows[2]
    assert "It is worse than fp." in conclusion.caution


@pytest.mark.parametrize("metric", ["perplexity", "kl_divergence"])
def test_costs_recommend_nothing(metric: str) -> None:
    conclusion = verdict(made_results({"fp": FP, "uniform:4": FP, "uniform:2": FP}, metrics=(metric, "rougeL")))
    assert conclusion.row is None
    assert conclusion.title == "No recommendation"
    assert "what each schedule costs" in conclusion.reason


def test_too_little_recommends_nothing() -> None:
    alone = verdict(made_results({"fp": FP, "uniform:4": FP}))
    assert (alone.row, "--schedule" in alone.reason) == (None, True)
    one = verdict(made_results({"fp": (1.0,), "uniform:4": (1.0,), "uniform:2": (1.0,)}))
    assert (one.row, "one sample" in one.reason) == (None, True)


def test_the_verdict_is_in_every_format(results: QualityResults, page: str) -> None:
    conclusion = verdict(results)
    assert results.to_markdown().startswith(conclusion.text)
    assert json.loads(results.to_json())["verdict"]["recommended"] == "static:4@0,2@3"
    assert page.index("<h2>Recommended: static:4@0,2@3</h2>") < page.index("<table")
    assert page.count('<span class="badge">recommended</span>') == len(results.metrics)


def test_every_metric_has_its_differences(results: QualityResults, page: str) -> None:
    assert page.count('data-label="to fp"') == page.count('data-label="to most bits"') == 2 * len(results.rows)
    assert page.count("Numbers of this plot") == len(results.metrics)
    cells = re.findall(r'data-label="to most bits">([^<]+)', page)
    assert cells[:4] == ["–", "–", "−5.10", "−0.20"]


def test_samples_and_those_left_out_are_in_sight(page: str) -> None:
    assert "<li>6 samples of data.jsonl</li>" in page
    assert "<li>2 skipped, too long for the model</li>" in page


@pytest.mark.full
def test_few_samples_are_all_shown_and_of_many_also_the_worst() -> None:
    few = made_results({"fp": FP, "uniform:4": FP, "uniform:2": near(FP)})
    assert "All 6 samples" in render_html(few)
    high = [10.0] * 20
    low = [10.2] * 20
    low[15], low[7] = 7.0, 5.0
    page = render_html(made_results({"fp": high, "uniform:4": high, "uniform:2": low}))
    first, worst = page.split("in which uniform:2 loses most")
    assert re.findall(r"<h4>data.jsonl:(\d+)</h4>", first) == [str(line) for line in range(1, SHOWN_SAMPLES + 1)]
    assert re.findall(r"<h4>data.jsonl:(\d+)</h4>", worst) == ["8", "16"]
    assert "ROUGE-L 5.00 (−5.00)" in worst


def test_texts_are_escaped_and_nothing_is_loaded(page: str) -> None:
    assert "&lt;script&gt;" in page
    assert "Some &lt;CPU&gt;" in page
    assert not re.search(r"<(script|link|img|iframe|object|embed|image)\b", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"url\((?!#)|@import", page)
    # The namespaces of SVG are names, not addresses; nothing else starts like one.
    addresses = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= addresses


def test_tokens_are_marked_with_their_precision(page: str) -> None:
    assert '<mark class="shade-blue" title="4 bits">&lt;script' in page
    assert '<mark class="shade-red" title="2 bits"> &lt;script' in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#0000?01|#00010\d", page)


def test_every_row_is_in_every_plot(results: QualityResults, page: str) -> None:
    for row in results.rows:
        assert page.count(f">{row.name}</text>") == 2 * len(results.metrics)  # for wide and for narrow screens


def test_no_axis_shows_what_a_metric_cannot_be(page: str) -> None:
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in re.findall(r">([\N{MINUS SIGN}]?\d+)</text>", page)]
    assert min(ticks) >= 0
    assert max(ticks) <= 100


def test_names_in_plots_do_not_overlap() -> None:
    """Schedules that are as good with nearly as many bits stand beside each other."""
    results = made_results({"fp": FP, "uniform:4": near(FP, -1), "uniform:2": near(FP, -1), "static:4@0,2@3": FP})
    rows = [replace(row, average_bits=bits) for row, bits in zip(results.rows, (16, 3.05, 3.0, 3.2), strict=True)]
    results = replace(results, rows=tuple(rows))
    colors = row_colors(results)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 4.0), dpi=72, layout="constrained")
        axes = figure.subplots()
        _draw_quality(axes, results.metrics[0], results.rows, colors)
        figure.draw_without_rendering()
        _label_points(axes, results.metrics[0], results.rows, colors)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_long_names_in_plots_are_broken_after_commas() -> None:
    assert _lines("uniform:4", 4) == ["uniform:4"]
    assert _lines("static:5@0,4@16,3@32", 15) == ["static:5@0,", "4@16,3@32"]


def test_a_switch_stays_sharp() -> None:
    """Speeds are smoothed among steps of one precision only, over as many of them as there are, nine at most."""
    seconds, bits = [4.0] * 12 + [2.0] * 3, [4] * 12 + [2] * 3
    assert _smooth(seconds, bits) == seconds
    assert _smooth([9.0, 0.0, 0.0, 5.0], [4, 4, 4, 2]) == [3.0, 3.0, 3.0, 5.0]


def test_ids_of_the_plots_do_not_clash(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


@pytest.mark.full
def test_speed_is_shown_where_it_was_measured(page: str) -> None:
    assert "Not measured. With <code>--speed</code>" in page
    speeds = {
        name: Estimate(speed, 10.0, 5)
        for name, speed in (("uniform:4", 250.0), ("uniform:2", 500.0), ("static:4@0,2@3", 400.0))
    }
    scores = {"fp": FP, "uniform:4": FP, "uniform:2": near(FP, -5), "static:4@0,2@3": near(FP)}
    timed = render_html(made_results(scores, speeds=speeds))
    assert "Not measured" not in timed
    assert "<b>1.60 × <span>± 0.08</span></b>decode speed, against uniform:4" in timed
    # 1000 / bits, as the steps' times say; the first token is not one of them.
    numbers = timed[timed.index('<th scope="col">tokens/s</th>') :]
    runs = re.findall(r"<td>(\S+)</td><td>(\d)</td><td>(\S+)</td>", numbers)
    assert runs == [("2–8", "4", "250.0"), ("2–8", "2", "500.0"), ("2–4", "4", "250.0"), ("5–8", "2", "500.0")]


def test_a_speed_of_more_steps_than_answers_have_is_drawn(results: QualityResults) -> None:
    rows = [replace(row, decode_tps=Estimate(9.0, 1.0, 5), step_seconds=(0.1,) * 12) for row in results.schedules]
    assert ">5–13</td>" in render_html(
        replace(results, rows=(results.rows[0], *rows))
    )  # static:4@0,2@3 after its switch


@pytest.mark.full
def test_all_turns_are_shown() -> None:
    results = made_results({"fp": FP, "uniform:4": FP}, text="some words")
    rows = [
        replace(row, samples=tuple(replace(sample, turns=sample.turns * 2) for sample in row.samples))
        for row in results.rows
    ]
    once, twice = (
        render_html(each).count("some words</mark>") for each in (results, replace(results, rows=tuple(rows)))
    )
    assert (once, twice) == (6, 12)


@pytest.mark.full
def test_without_texts_there_are_no_answers() -> None:
    assert "Answers side by side" not in render_html(made_results({"fp": FP, "uniform:4": FP}, text=""))


@pytest.mark.full
def test_the_command_repeats_every_setting() -> None:
    """What it prints is what the command line reads."""
    results = made_results(
        {"fp": FP, "uniform:4": FP, "static:4@0,2@3": FP},
        settings={
            "limit": 6,
            "prompt_template": "Say {text}:\n",
            "metrics": ["rougeL", "bleu"],
            "require_fast_kernels": True,
            "reference_backend": "transformers",
        },
    )
    words = shlex.split(repeat_command(results.environment).replace("\\\n", ""))
    assert words[:2] == ["pmpd-eval", "demo-pmpd"]
    options = quality.make_context("quality", words[1:]).params
    assert options["schedules"] == ("uniform:4", "static:4@0,2@3")
    assert (options["limit"], options["max_new_tokens"], options["threads"]) == (6, 8, 2)
    assert (options["chat"], options["require_fast_kernels"], options["speed"]) == (False, True, False)
    assert (options["prompt_template"], options["metrics"]) == ("Say {text}:\n", ("rougeL", "bleu"))
    page = render_html(results)
    assert all(digest * 64 in page for digest in "abc")  # data, bundle, fp model
