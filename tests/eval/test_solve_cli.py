"""`pmpd-schedule` as a user types it, on the demo model: what it finds, writes, and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pmpd.eval.measure.forks import Forks
from pmpd.eval.solve import publish as publishing
from pmpd.eval.solve.cli import main
from pmpd.eval.solve.publish import publish
from pmpd.runtime import Bundle, Generator, PmpdError
from pmpd.runtime.cli import main as run_main

STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her friends.",
    "Tom had a red ball. He threw it over the fence, and the dog ran after it as fast as it could.",
    "One day, a small bird sat on a big tree. It was sad because it could not find its mom.",
    "Sara and Ben went to the park. They saw a big slide and wanted to play on it all day.",
]
TEMPLATE = r"A story.\n{start}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "stories.jsonl"
    lines = [json.dumps({"start": text[:24], "end": text[24:]}) for text in STORIES]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy that can be written to; its weights are a link."""
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    return copy


def schedule(bundle: Path, data: Path, *arguments: object) -> Result:
    options = ["--task", "jsonl", "--data", data, "--prompt-template", TEMPLATE, "--max-new-tokens", 9, "--threads", 1]
    words = [str(word) for word in (bundle, *options, *arguments)]
    return CliRunner().invoke(main, words, prog_name="pmpd-schedule")


def rows(result: Result) -> dict[str, list[str]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {line[0]: line[1:] for line in cells}


def test_what_is_found_decodes_from_then_on(bundle: Path, data: Path) -> None:
    result = schedule(bundle, data, "--tolerance", "30%", "--as", "stories", "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    table = rows(result)
    assert {"uniform:4", "uniform:3", "uniform:2"} <= set(table)
    (found,) = [name for name, cells in table.items() if cells[-1] == "found"]
    assert float(table[found][0]) < 4
    manifest = Bundle.open(bundle, verify=True).manifest
    assert (manifest.default_schedule, manifest.schedules["stories"]) == ("stories", found)
    assert manifest.schedules["default"] == "uniform:4"
    (report,) = (bundle / "schedules").iterdir()
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["schedule"] == found
    assert "less than 4 samples can tell apart" in document["caution"]
    assert document["caution"] in result.stdout
    assert document["data"]["samples"] == len(STORIES)
    assert {c["schedule"] for phase in document["phases"] for c in phase["candidates"]} == set(table)
    generator = Generator(Bundle.open(bundle), context_length=64)
    bits = [t.precision for t in generator.generate([1, 5, 9], max_new_tokens=9, stop_ids=()).tokens[1:]]
    assert bits != [4] * 8
    words = [str(bundle), "-p", STORIES[0], "-n", "4", "--schedule", "stories", "-q"]
    assert CliRunner().invoke(run_main, words).exit_code == 0
    info = CliRunner().invoke(run_main, [str(bundle), "--info"]).stdout.splitlines()
    assert "schedule  default: uniform:4" in info
    assert f"schedule  stories (default): {document['verdict']}" in info


def test_a_tolerance_that_nothing_meets(bundle: Path, tmp_path: Path, data: Path) -> None:
    before = (bundle / "bundle.json").read_bytes()
    report = tmp_path / "r.json"
    result = schedule(bundle, data, "--tolerance", 0, "--switch-points", 2, "--json", report, "--dry-run", "-q")
    assert result.exit_code == 0, result.stderr
    assert "uniform:4: no lower precision keeps ROUGE-L within 0\n" in result.stdout
    assert "can tell apart" not in result.stdout
    assert json.loads(report.read_text(encoding="utf-8"))["schedule"] == "uniform:4"
    assert (bundle / "bundle.json").read_bytes() == before
    assert not (bundle / "schedules").exists()


def test_answers_of_one_token_have_no_steps_to_lower(bundle: Path, data: Path) -> None:
    result = schedule(bundle, data, "--max-new-tokens", 1, "-q")
    assert result.exit_code == 0, result.stderr
    assert "all answers have one token, so there is no decode step to lower" in result.stdout


def test_the_prompt_may_have_fewer_bits(bundle: Path, data: Path) -> None:
    table = rows(schedule(bundle, data, "--low-prefill", "--dry-run", "-q", "--exact", "--tolerance", "100%"))
    assert {f"prefill:{p},uniform:{d}" for p in (3, 2) for d in (4, 3, 2)} <= set(table)
    assert table["prefill:2,uniform:2"][-1] == "found"


def test_adaptive_schedules_are_tried_when_asked_for(bundle: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    options = ("--adaptive", "--dry-run", "-q", "--exact", "--tolerance", "1%", "--json", report)
    table = rows(schedule(bundle, data, *options))
    adaptive = {name: cells for name, cells in table.items() if name.startswith("adaptive:")}
    assert {"adaptive:2,4@0.25", "adaptive:3,4@4"} <= set(adaptive)
    assert all(2 <= float(cells[0]) <= 4 for cells in adaptive.values())
    assert float(adaptive["adaptive:2,4@0.25"][0]) < float(adaptive["adaptive:2,4@4"][0])
    repeats = {name: float(cells[0]) for name, cells in table.items() if name.startswith("repeat:")}
    assert {name.replace("repeat", "adaptive") for name in repeats} == set(adaptive)
    assert 2 <= repeats["repeat:2,4@0.25"] < repeats["repeat:2,4@4"] <= 6
    good = {name: float(cells[0]) for name, cells in table.items() if cells[-1] != "loses too much"}
    (best,) = [name for name, cells in table.items() if cells[-1] == "found"]
    assert good[best] == min(good.values())


@pytest.mark.parametrize("what", ["bytes", "time"])
def test_other_objectives(bundle: Path, data: Path, tmp_path: Path, what: str) -> None:
    report = tmp_path / "r.json"
    options = ("--minimize", what, "--dry-run", "-q", "--exact", "--json", report)
    assert schedule(bundle, data, *options).exit_code == 0
    document = json.loads(report.read_text(encoding="utf-8"))
    costs = {c["schedule"]: c["cost"] for phase in document["phases"] for c in phase["candidates"]}
    assert document["minimize"] == what
    if what == "bytes":
        assert costs["uniform:2"] < costs["uniform:3"] < costs["uniform:4"]
        assert costs["uniform:2"] > 100_000
    else:
        assert all(0 < cost < 1 for cost in costs.values())


def test_the_best_at_a_speed(bundle: Path, data: Path) -> None:
    result = schedule(bundle, data, "--target-tps", 0.001, "--dry-run", "-q")
    assert result.exit_code == 0, result.stderr
    # All are fast enough; the reference is compared with its own answers, and so is what answers alike.
    (score,) = [cells[2] for cells in rows(result).values() if cells[-1] == "found"]
    assert score == "100.00"
    result = schedule(bundle, data, "--target-tps", 1e9, "--dry-run", "-q")
    assert result.exit_code == 1
    assert "no schedule of this bundle reaches 1e+09 tokens/s here: " in result.stderr


def test_a_search_goes_on_where_it_was(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Forks.answers
    calls = []

    def counted(self: Forks, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answers(self, *arguments)

    monkeypatch.setattr(Forks, "answers", counted)
    first = schedule(bundle, data, "-q", "--dry-run", "--exact")
    assert first.exit_code == 130
    assert "goes on with what is measured" in first.stderr
    whole = schedule(bundle, data, "-q", "--dry-run", "--exact")
    assert whole.exit_code == 0, whole.stderr
    prompts = [arguments[0] for arguments in calls[:2]]
    assert not any(arguments[0] in prompts for arguments in calls[3:5])
    done = len(calls)
    again = schedule(bundle, data, "-q", "--dry-run", "--exact")
    assert len(calls) == done
    assert again.stdout.replace("0 decode steps", "") == whole.stdout.replace(_steps(whole), "")


def _steps(result: Result) -> str:
    (line,) = [line for line in result.stdout.splitlines() if "decode steps computed" in line]
    return line.partition(" computed")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "perplexity"], "the task perplexity scores given texts, and a schedule is found by answers"),
        (["--task", "jsnol"], "unknown task 'jsnol'"),
        (["--tolerance", "lots"], "tolerance 'lots': give a number in units of the metric, or a share such as 1%"),
        (["--minimize", "joules"], "unknown objective 'joules': choose one of bits, bytes, time"),
        (["--metric", "bleu"], "unknown metric 'bleu': choose one of rougeL"),
        (["--switch-points", 1], "switch points must be 2 or more"),
        (["--target-tps", 0], "target must be a number of tokens per second above 0, got 0.0"),
        (["--limit", 1], "gives one sample, and a schedule needs two: add records or raise --limit"),
        (["--as", "a/b"], "schedule name 'a/b': use letters, digits, '.', '_' and '-'"),
        (["--data", "nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_get_one_line(bundle: Path, data: Path, arguments: list[object], message: str) -> None:
    before = sorted(bundle.rglob("*"))
    result = schedule(bundle, data, *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(bundle.rglob("*")) == before


def test_no_data(bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    result = schedule(bundle, empty)
    assert result.exit_code == 1
    assert "has nothing to measure" in result.stderr


def test_a_name_is_replaced_with_its_report(bundle: Path) -> None:
    for text, report in (("uniform:3", "{}"), ("uniform:2", '{"a": 1}'), ("uniform:2", '{"a": 1}')):
        publish(Bundle.open(bundle), "mine", text, report, default=False)
    publish(Bundle.open(bundle), "mine-2", "uniform:3", "{}", default=True)
    manifest = Bundle.open(bundle, verify=True).manifest
    assert manifest.schedules == {"default": "uniform:4", "mine": "uniform:2", "mine-2": "uniform:3"}
    assert manifest.default_schedule == "mine-2"
    reports = sorted(path.name for path in (bundle / "schedules").iterdir())
    assert sorted(name.rpartition("-")[0] for name in reports) == ["mine", "mine-2"]
    assert {f"schedules/{name}" for name in reports} <= set(manifest.files)


@pytest.mark.parametrize("report", ['{"verdict": 3}', "{}"])
def test_a_report_without_a_verdict_says_nothing(bundle: Path, report: str) -> None:
    publish(Bundle.open(bundle), "mine", "uniform:3", report, default=True)
    opened = Bundle.open(bundle)
    assert (opened.why("mine"), opened.why("default")) == (None, None)


def test_a_report_that_is_no_json_is_one_clear_line(bundle: Path) -> None:
    publish(Bundle.open(bundle), "mine", "uniform:3", "{", default=True)
    result = CliRunner().invoke(run_main, [str(bundle), "--info"])
    assert result.exit_code == 1
    assert "schedules/mine-" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("write", [1, 2])
def test_a_kill_between_two_writes_leaves_a_bundle(bundle: Path, write: int, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(Bundle.open(bundle), "mine", "uniform:3", "{}", default=True)
    writes = []

    def killed(path: Path, content: str | bytes) -> None:
        writes.append(path)
        if len(writes) == write:
            raise KeyboardInterrupt
        original(path, content)

    original = publishing.write_atomically
    monkeypatch.setattr(publishing, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(Bundle.open(bundle), "mine", "uniform:2", '{"a": 1}', default=True)
    assert Bundle.open(bundle, verify=True).manifest.schedule == "uniform:3"


def test_what_a_killed_process_left_goes_and_nothing_else(bundle: Path) -> None:
    publish(Bundle.open(bundle), "mine", "uniform:3", "{}", default=False)
    (listed,) = (bundle / "schedules").iterdir()
    left = ["schedules/mine-00000000.json", "schedules/other-12345678.json", "schedules/.mine-12345678.json.17"]
    others = ["schedules/notes.txt", "schedules/mine.json", "bundle.json.old"]
    for name in [*left, ".bundle.json.17", *others]:
        (bundle / name).write_text("{}", encoding="utf-8")
    publish(Bundle.open(bundle), "yours", "uniform:2", "{}", default=False)
    assert listed.is_file()
    assert not [name for name in [*left, ".bundle.json.17"] if (bundle / name).exists()]
    assert [name for name in others if not (bundle / name).is_file()] == []


def test_nothing_is_written_outside_a_bundle(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle / "schedules").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PmpdError, match="is a link: nothing is written outside a bundle"):
        publish(Bundle.open(bundle), "mine", "uniform:3", "{}", default=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []
