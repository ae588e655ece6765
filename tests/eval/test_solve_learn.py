"""`pmpd-schedule learn` as a user types it, on the demo model, and what its table says."""

from __future__ import annotations

import json
import os
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pmpd.eval.measure.forks import Forks
from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.solve import network
from pmpd.eval.solve.cli import main
from pmpd.eval.solve.lesson import Lesson
from pmpd.eval.solve.network import Training
from pmpd.eval.solve.prompts import WRITTEN
from pmpd.runtime import Bundle, Generator, StaticSchedule
from pmpd.runtime.cli import main as run_main

STORY = "Once upon a time there was a little girl who had a red ball and a big dog that ran in the park"


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    return copy


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.permutation(STORY.split() * 2))}) for _ in range(20)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def learn(bundle: Path, *arguments: object) -> Result:
    options = ["--max-new-tokens", 7, "--threads", 1, "--seeds", 1, "--hidden", 4]
    words = [str(word) for word in ("learn", bundle, *options, *arguments)]
    return CliRunner().invoke(main, words, prog_name="pmpd-schedule")


def test_what_is_learned_decodes_by_name(bundle: Path, texts: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    result = learn(bundle, "--data", texts, "--samples", 20, "--reference", "highest", "--json", report, "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "20 prompts, each chosen for by a network that has not seen it; ROUGE-L to highest" in result.stdout
    manifest = Bundle.open(bundle, verify=True).manifest
    assert manifest.default_schedule == "default"
    assert manifest.schedules["learned"].startswith("learned:schedules/learned-")
    document = json.loads(report.read_text(encoding="utf-8"))
    assert str(tmp_path) not in report.read_text(encoding="utf-8")  # a bundle is published
    assert document["choices"] == ["uniform:2", "static:4@0,2@2", "static:4@0,2@4", "uniform:4"]
    assert {"learned", "random, uniform", "random, prior", "random, shuffled", "labels"} <= document["rows"].keys()
    assert document["rows"]["uniform:4"]["average_bits"] == 4
    words = [str(bundle), "-p", "Once upon", "-n", "4", "--schedule", "learned", "-q"]
    assert CliRunner().invoke(run_main, words).exit_code == 0
    info = CliRunner().invoke(run_main, [str(bundle), "--info"]).stdout
    assert f"schedule  learned: {document['verdict'][:200]}" in info


@pytest.mark.full
def test_it_goes_on_where_it_was_interrupted(
    bundle: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, ...]]()
    answers = Forks.answers

    def counted(forks: Forks, prompt: tuple[int, ...], schedules: list[StaticSchedule]) -> object:
        asked.append(prompt)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answers(forks, prompt, schedules)

    monkeypatch.setattr(Forks, "answers", counted)
    options = ("--data", texts, "--samples", 20, "--reference", "highest", "--dry-run", "-q", "--json")
    result = learn(bundle, *options, tmp_path / "1.json")
    assert result.exit_code == 130
    assert "interrupted: the bundle is as it was; the same command goes on" in result.stderr
    assert learn(bundle, *options, tmp_path / "2.json").exit_code == 0
    assert len(asked) == 20 + 1
    assert learn(bundle, *options, tmp_path / "3.json").exit_code == 0
    assert len(asked) == 20 + 1
    second, third = (json.loads((tmp_path / f"{n}.json").read_text(encoding="utf-8")) for n in (2, 3))
    for document in (second, third):
        del document["milliseconds"], document["share_of_prefill"]
    assert second == third


@pytest.mark.full
def test_without_texts_the_model_writes_them(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WRITTEN, False, 40)
    monkeypatch.setattr(network, "EPOCHS", 20)
    result = learn(bundle, "--samples", 18, "--reference", "highest", "--dry-run", "-q")
    assert result.exit_code == 0, result.stderr
    (own,) = (file for file in cache.iterdir() if "text" in json.loads(file.read_text("utf-8").splitlines()[0] or "{}"))
    lines = own.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 18
    own.write_text("\n".join(lines[:7]) + '\n{"text": "cut o', encoding="utf-8")  # killed
    assert (
        learn(bundle, "--samples", 18, "--reference", "highest", "--dry-run", "-q").stdout.partition("A choice")[0]
        == (result.stdout.partition("A choice")[0])
    )
    assert own.read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", 3), "a schedule is learned from 16 prompts or more, got 3"),
        (("--layer", "frist"), "unknown layer 'frist': choose one of first, "),
        (("--confidence", 1), "confidence must be between 0 and 1, got 1.0"),
        (("--tolerance", 2), "tolerance must be a share of ROUGE-L from 0 to below 1, got 2.0"),
        (("--max-new-tokens", 0), "max new tokens must be 1 or more, got 0"),
        (("--hidden", 0), "hidden must be 1 or more, got 0"),
        (("--precisions", "4,5"), "unknown precision '5': choose one of 4, 3, 2"),
        (("--precisions", "4"), "a schedule is learned over two precisions or more, got 4"),
        (("--task", "dialogsum"), "the task dialogsum needs --data: its examples"),
        (("--task", "perplexity", "--data", "{texts}"), "unknown task 'perplexity': choose one of "),
        (("--switch-points", 1), "switch points must be 2 or more"),
        (("--as", "a/b"), "schedule name 'a/b': use letters"),
        (("--reference", "/nowhere"), "no fp reference: "),
        (("--data", "{texts}", "--max-new-tokens", 1), "all answers have one token"),
        (("--data", "{short}"), "0 prompts are usable and 16 are needed: give more or longer ones"),
        (("--data", "{texts}", "--prompt-template", "x"), "has no {field}"),
    ],
)
def test_bad_input_is_one_line(bundle: Path, texts: Path, tmp_path: Path, arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a"}\n' * 20, encoding="utf-8")
    before = sorted(bundle.rglob("*"))
    words = [str(word).format(texts=texts, short=short, field="{field}") for word in arguments]
    reference = () if "--reference" in words else ("--reference", "highest")
    result = learn(bundle, *reference, *words, "-q")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(bundle.rglob("*")) == before


def sample(score: float, bits: int) -> Sample:
    return Sample(turns=(Turn(prompt_tokens=1, segments=((4, 1, ""), (bits, 4, ""))),), scores={"rougeL": score})


def lesson(scores: list[list[float]], chosen: list[int]) -> Lesson:
    return Lesson(
        choices=(StaticSchedule(((2, 0),)), StaticSchedule(((4, 0),))),
        length=4,
        labels=(0, 1, 1),
        samples=tuple((sample(low, 2), sample(high, 4)) for low, high in scores),
        chosen=tuple(chosen),
        course=Training(1, 0.5, 0.5, 0.6),
        settings={},
        reference="fp",
        milliseconds=0.1,
        share_of_prefill=0.001,
    )


def test_shuffled_is_the_mean_over_all_orders_of_the_choices() -> None:
    scores, chosen = [[10.0, 50.0], [60.0, 40.0], [20.0, 80.0]], [1, 0, 1]
    table = lesson(scores, chosen)
    row = table.rows()["random, shuffled"]
    orders = [np.mean([scores[i][c] for i, c in enumerate(order)]) for order in permutations(chosen)]
    assert table.score(row).value == pytest.approx(np.mean(orders))
    assert table.bits(row) == pytest.approx(table.bits(table.rows()["learned"]))
    assert table.ahead(row).value == pytest.approx(np.mean([50, 60, 80]) - np.mean(orders))


def test_rows_of_one_choice_are_what_that_choice_gave() -> None:
    table = lesson([[10.0, 50.0], [60.0, 40.0], [20.0, 80.0]], [0, 0, 1])
    rows = table.rows()
    assert table.score(rows["uniform:2"]).value == pytest.approx(30)
    assert table.bits(rows["uniform:2"]) == 2
    assert table.score(rows["random, uniform"]).value == pytest.approx((30 + 170 / 3) / 2)
    assert table.bits(rows["random, prior"]) == pytest.approx((2 + 2 * 4) / 3)
    assert table.score(rows["labels"]).value == pytest.approx((10 + 40 + 80) / 3)


def test_a_schedule_of_the_bundle_is_measured_by_its_name(bundle: Path, texts: Path) -> None:
    from pmpd.eval.cli import main as eval_main

    learn(bundle, "--data", texts, "--samples", 20, "--reference", "highest", "-q")
    words = [str(bundle), "--task", "jsonl", "--data", str(texts), "--prompt-template", "{text}", "--limit", "2"]
    result = CliRunner().invoke(eval_main, [*words, "--max-new-tokens", "5", "--schedule", "learned", "-q"])
    assert result.exit_code == 0, result.stderr
    assert "| learned:schedules/learned-" in result.stdout
    generator = Generator(Bundle.open(bundle), context_length=64)
    assert generator.generate([1, 5, 9], max_new_tokens=5, schedule="learned").tokens


def test_labels_are_by_rouge_whatever_the_task_shows(bundle: Path, tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.jsonl"
    records = [{"fr": f"{i} petits chiens, " * 20, "en": f"{i} small dogs"} for i in range(16)]
    sentences.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    options = ["--task", "iwslt", "--data", str(sentences), "--samples", "16", "--max-new-tokens", "3", "--seeds", "1"]
    result = CliRunner().invoke(main, ["learn", str(bundle), *options, "--dry-run", "--threads", "1", "-q"])
    assert result.exit_code == 0, result.stderr
    assert "ROUGE-L to references" in result.stdout
