"""Recipes on the demo model, with a network that chooses by nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pmpd.eval.cli import main
from pmpd.eval.methods.compare import layers_of
from pmpd.eval.metrics.base import Metric, Sample, Turn
from pmpd.eval.recipes.halves import HALVES
from pmpd.eval.recipes.paper import PAPER, of_model
from pmpd.eval.recipes.plots import recipe_plot
from pmpd.eval.recipes.recipe import RECIPES, RecipeSettings, run_recipe
from pmpd.eval.recipes.rows import random_row, with_outliers
from pmpd.eval.recipes.tables import RecipeResults
from pmpd.eval.report.results import QualityRow
from pmpd.eval.solve.network import Network, to_onnx
from pmpd.eval.solve.publish import publish
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.schedule.learned import SchedulerCard, weights_digest

DEMO = Path(__file__).resolve().parents[2] / "exporter" / "demo" / "model"
QUESTIONS = [["Once upon a time there was", "Then"], ["Tom had a red ball and", "Then"], ["Sara went to the", "So"]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """Have the demo bundle with a learned schedule."""
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    opened = Bundle.open(copy)
    kv = opened.manifest.kv_cache
    card = SchedulerCard(
        choices=("2@0", "4@0"), length=8, layer=0, prefill=4, confidence=0.5, weights=weights_digest(opened.manifest)
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = to_onnx(Network(kv.head_dim, 2, 4), card, heads=kv.heads, dtype=kv.dtype)
    publish(opened, "learned", network, json.dumps({"label_shares": [0.25, 0.75]}), default=False)
    return copy


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in QUESTIONS), encoding="utf-8")
    return file


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    file = tmp_path / "dialogues.jsonl"
    records = [{"dialogue": f"#Person1#: {turns[0]} …", "summary": "They talk about a ball."} for turns in QUESTIONS]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def run(bundle: Path, recipe: str, data: dict[str, Path], **options: Any) -> RecipeResults:
    evaluation = {"max_new_tokens": 9, "threads": 1, "reference": str(DEMO)}
    settings = {"dev": {}, "static": {}, **options}
    return run_recipe(Bundle.open(bundle), RecipeSettings(recipe=recipe, data=data, evaluation=evaluation, **settings))


def test_table_1_has_the_rows_of_the_paper(bundle: Path, dialogues: Path) -> None:
    results = run(bundle, "table1", {"dialogsum": dialogues}, static={"dialogsum": "static:4@0,2@4"})
    (part,) = results.parts
    assert [label for label in part.labels if label != "DNS"] == [r for r in RECIPES["table1"].rows if r != "DNS"]
    assert part.labels["baseline-l"] == "prefill:2,uniform:2"
    assert part.labels["baseline-h"] == "uniform:4"
    assert part.labels["PMPD-Learned"].endswith("@9")
    bits = {label: part.row(label).average_bits or 0.0 for label in part.labels}
    assert (bits["baseline-l"], bits["baseline-h"]) == (2, 4)
    assert [line[0] for line in results.summary()] == ["method", *part.labels]
    document = json.loads(results.to_json())
    samples = [s for row in document["parts"][0]["results"]["rows"] for s in row["samples"]]
    assert samples
    assert not any({"prompt", "reference"} & sample.keys() for sample in samples)
    assert "They talk about a ball" not in results.to_json()
    assert len(results.to_csv().splitlines()) == 1 + len(part.labels)


def test_dense_and_sparse_has_the_bits_of_the_schedule(demo_bundle: Path, dialogues: Path) -> None:
    data = {"dialogsum": dialogues}
    (part,) = run(demo_bundle, "table1", data, static={"dialogsum": "static:4@0,2@3"}).parts
    assert part.row("DNS").average_bits == part.row("PMPD-Static").average_bits
    assert any("no learned schedule" in note for note in part.notes)
    (part,) = run(demo_bundle, "table1", data, static={"dialogsum": "uniform:3"}).parts
    assert "DNS" not in part.labels
    assert any("nothing left for outliers" in note for note in part.notes)


def test_a_static_schedule_is_found_on_other_examples(bundle: Path, dialogues: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text(dialogues.read_text(encoding="utf-8").replace("ball", "bird"), encoding="utf-8")
    data = {"dialogsum": dialogues}
    (part,) = run(bundle, "table5", data, dev={"dialogsum": dev}).parts
    assert "PMPD-Static" in part.labels
    assert any("found on 3 samples of dev.jsonl" in note for note in part.notes)
    (part,) = run(bundle, "table5", data).parts
    assert "PMPD-Static" not in part.labels
    assert any("--dev dialogsum=FILE" in note for note in part.notes)


def test_table_4_takes_both_turns_and_compares_with_fp(bundle: Path, questions: Path) -> None:
    (part,) = run(bundle, "table4", {"mt_bench": questions}).parts
    assert part.labels["low prompt, high answer"] == "prefill:2,uniform:4"
    row = part.row("low prompt, high answer")
    assert all(len(sample.turns) == 2 for sample in row.samples)
    assert row.samples[0].turns[0].precisions[:2] == (2, 4)
    assert part.results.rows[0].metrics["rougeL"].value == 100


def test_figure_3_has_the_high_precision_in_half_of_the_steps(bundle: Path, questions: Path) -> None:
    (part,) = run(bundle, "figure3", {"mt_bench": questions}).parts
    first = part.row("first half").samples[0].turns
    assert len(first) == 1  # one turn
    assert first[0].precisions[1:] == (4, 4, 4, 4, 2, 2, 2, 2)
    assert part.row("last half").samples[0].turns[0].precisions[1:] == (2, 2, 2, 2, 4, 4, 4, 4)
    assert part.row("low throughout").average_bits == 2
    again = run(bundle, "figure3", {"mt_bench": questions}).parts[0]
    assert again.results.rows == part.results.rows


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
@pytest.mark.parametrize("half", list(HALVES))
def test_halves_are_halves(half: str, steps: int) -> None:
    count = (steps + 1) // 2
    chosen = HALVES[half](steps, count)
    assert len(set(chosen)) == count
    assert set(chosen) <= set(range(steps))


def test_figure_7_has_choices_at_random(bundle: Path, questions: Path) -> None:
    results = run(bundle, "figure7", {"mt_bench": questions})
    (part,) = results.parts
    learned, shuffled = part.row("PMPD-Learned"), part.row("random shuffled")
    assert shuffled.average_bits == pytest.approx(learned.average_bits, rel=0.05)
    assert results.score(part, "baseline-h") == 1
    assert results.summary()[0][-2:] == ["bits", "of high"]


def row(name: str, scores: list[float], bits: int, tokens: int) -> QualityRow:
    samples = [
        Sample(
            source=str(i),
            group=str(i),
            turns=(Turn(prompt_tokens=1, segments=((4, 1, "a"), (bits, tokens, "b"))),),
            scores={"rougeL": score},
        )
        for i, score in enumerate(scores)
    ]
    return QualityRow.of(name, samples, [Metric("rougeL", "ROUGE-L")])


def test_a_random_row_is_the_mean_over_its_choices() -> None:
    choices = [row("uniform:2", [10, 20], 2, 6), row("uniform:4", [30, 60], 4, 3)]
    mixed = random_row("random", choices, [0.25, 0.75], [Metric("rougeL", "ROUGE-L")])
    assert [sample.scores["rougeL"] for sample in mixed.samples] == [25, 50]
    assert mixed.average_bits == pytest.approx((0.25 * 6 * 2 + 0.75 * 3 * 4) / (0.25 * 6 + 0.75 * 3))


def test_outliers_are_the_weights_of_most_error(demo_bundle: Path) -> None:
    layer = layers_of(Bundle.open(demo_bundle), str(DEMO))[0]
    checkpoint = open_checkpoint(str(DEMO))
    weights = {name: checkpoint.tensor(name) for name in layer.layer.weight_names}
    exact = np.concatenate([layer.layer.part_weight(i, w) for i, w in enumerate(weights.values())])
    before = np.abs(exact - layer.weight(2)).reshape(-1)
    after = np.abs(exact - with_outliers(layer, weights, 2, 0.01).weight(2)).reshape(-1)
    places = np.flatnonzero(before != after)
    assert len(places) == pytest.approx(0.01 * before.size, abs=2)
    assert before[places].min() >= np.delete(before, places).max()
    assert after[places].max() < 1e-3


def test_the_paper_stands_beside_its_own_models() -> None:
    assert of_model("table1", "dialogsum", "vicuna-7b-v1.5")["PMPD-Static"] == (2.0, (25.0, 88.2))
    assert of_model("table1", "dialogsum", "phi-1.5")["baseline-h"] == (4, (18.0, 86.1))
    assert of_model("table1", "dialogsum", "smollm2-135m") == {}
    rows = {label for recipe in PAPER for task in PAPER[recipe].values() for model in task.values() for label in model}
    assert rows <= {label for recipe in RECIPES.values() for label in recipe.rows}


def test_a_plot_names_every_row(bundle: Path, dialogues: Path) -> None:
    results = run(bundle, "figure6", {"dialogsum": dialogues})
    svg = recipe_plot(results)
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert all(label in text for label in results.labels)
    assert svg == recipe_plot(results)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel1", "--data", "dialogsum={data}"], "unknown recipe 'tabel1': choose one of table1"),
        (["table1"], "table1 needs data: give --data cnn_dailymail=FILE"),
        (["table1", "--data", "mt_bench={data}"], "--data: unknown task of table1 'mt_bench'"),
        (["table1", "--data", "{data}"], "give TASK=VALUE"),
        (["table1", "--data", "dialogsum={data}", "--data", "dialogsum={data}"], "dialogsum is given twice"),
        (["table1", "--data", "dialogsum=nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
        (["table1", "--data", "dialogsum={data}", "--high", "2", "--low", "4"], "the high precision must be above"),
        (["table1", "--data", "dialogsum={data}", "--low", "1"], "unknown precision '1'"),
        (["table1", "--data", "dialogsum={data}", "--learned", "default"], "is not a learned schedule"),
        (["table1", "--data", "dialogsum={data}", "--static", "dialogsum=uniform:9"], "uniform:9"),
        (["table1", "--data", "dialogsum={data}", "--tolerance", "much"], "tolerance 'much'"),
    ],
)
def test_what_does_not_fit_is_one_line(bundle: Path, dialogues: Path, words: list[str], message: str) -> None:
    name, *others = (word.replace("{data}", str(dialogues)) for word in words)
    result = CliRunner().invoke(main, ["recipe", name, str(bundle), *others, "--reference", str(DEMO), "-q"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_command_writes_what_it_prints(bundle: Path, dialogues: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv", "svg")}
    words = ["recipe", "figure6", str(bundle), "--data", f"dialogsum={dialogues}", "--reference", str(DEMO)]
    words += ["--max-new-tokens", "4", "--threads", "1", "-q", "--json", str(files["json"]), "--csv", str(files["csv"])]
    result = CliRunner().invoke(main, [*words, "--plot", str(files["svg"])])
    assert result.exit_code == 0, result.stderr
    assert "| low prompt, low answer" in result.stdout
    assert json.loads(files["json"].read_text(encoding="utf-8"))["recipe"] == "figure6"
    assert all(file.stat().st_size for file in files.values())
    with pytest.raises(PmpdError, match="needs data"):
        RecipeSettings(recipe="table1", data={}, dev={}, static={}, evaluation={})
