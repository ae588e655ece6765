"""`pmpd-eval` as a user types it, on the demo model: a real run of each kind, and every mistake."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from pmpd.eval import runner
from pmpd.eval.cli import main
from pmpd.eval.speed import speed
from pmpd.eval.tasks.registry import TASKS

STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her friends.",
    "Tom had a red ball. He threw it over the fence, and the dog ran after it as fast as it could.",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "stories.jsonl"
    lines = [json.dumps({"text": text, "start": text[:18], "end": text[18:], "empty": " "}) for text in STORIES]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pmpd-eval")


def table(result: Result) -> list[list[str]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_perplexity_of_the_demo_model(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    result = run(
        demo_bundle, "--task", "perplexity", "--data", data, "--max-new-tokens", 12, "--json", report,
        "--schedule", "4", "--schedule", "uniform:4", "--schedule", "static:3@2,2@4",
        "--schedule", "static:4@0,3@2,2@4",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert [line[0] for line in table(result)[2:]] == ["fp", "uniform:4", "static:4@0,3@2,2@4"]
    document = json.loads(report.read_text(encoding="utf-8"))
    fp, four, mixed = document["rows"]
    perplexities = [row["metrics"]["perplexity"]["value"] for row in (fp, four)]
    assert 1 < perplexities[0] < 60  # a story model reads a story
    assert abs(math.log(perplexities[1] / perplexities[0])) < 0.3
    assert mixed["average_bits"] < 4
    assert fp["average_bits"] == 16
    assert document["environment"]["data"]["name"] == "stories.jsonl"
    samples = len(fp["samples"])
    assert [line.partition(",")[0] for line in result.stderr.splitlines() if "left" in line][-1:] == [
        f"schedules {samples}/{samples}"
    ]
    assert result.stderr.splitlines().count(f"wrote {report}") == 1


def test_fidelity_of_the_demo_model(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    result = run(
        demo_bundle, "--task", "fidelity", "--data", data, "--max-new-tokens", 8, "--html", page, "--limit", 1, "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    rows = {line[0]: line for line in table(result)[2:]}
    assert list(rows) == ["fp", "uniform:4", "uniform:3", "uniform:2"]  # the default: every precision
    assert rows["fp"][3:] == ["0.0000", "–", "–", "100.00", "100.00"]
    assert 0 < float(rows["uniform:4"][3]) < float(rows["uniform:2"][3])
    assert rows["uniform:4"][4] == f"+{rows['uniform:4'][3]}"
    assert rows["uniform:4"][5] == "–"
    assert float(rows["uniform:2"][5]) == pytest.approx(
        float(rows["uniform:2"][3]) - float(rows["uniform:4"][3]), abs=2e-4
    )
    assert table(result)[0][3:] == [
        "KL divergence (nats) (7 tokens)", "to fp", "to high", "top-1 agreement % (7 tokens)", "ROUGE-L (1 answer)",
    ]  # fmt: skip
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_each_accuracy_gives_all_rows(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report, sheet, page = tmp_path / "r.json", tmp_path / "r.csv", tmp_path / "r.html"
    result = run(
        demo_bundle, "--task", "perplexity", "--data", data, "--max-new-tokens", 8, "--limit", 1, "-q",
        "--schedule", "uniform:4", "--schedule", "uniform:2", "--accuracy", "exact", "--accuracy", "int8",
        "--json", report, "--csv", sheet, "--html", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    names = ["fp", "uniform:4 exact", "uniform:2 exact", "uniform:4 int8", "uniform:2 int8"]
    assert [line[0] for line in table(result)[2:]] == names
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["environment"]["kernels"].keys() == {"exact", "int8"}
    rows = list(csv.DictReader(sheet.read_text(encoding="utf-8").splitlines()))
    assert [row["name"] for row in rows] == names
    perplexity = [row["metrics"]["perplexity"]["value"] for row in document["rows"]]
    assert [float(row["perplexity"]) for row in rows] == perplexity
    assert perplexity[3] == pytest.approx(perplexity[1], rel=0.05)  # 8 bits are enough for activations


def test_jsonl_with_a_template_and_a_reference(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    result = run(
        demo_bundle, "--task", "jsonl", "--data", data, "--prompt-template", r"A story.\n{start}", "--json", report,
        "--reference-field", "end", "--max-new-tokens", 6, "--schedule", "static:3@2", "--threads", 1, "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text(encoding="utf-8"))
    sample = document["rows"][1]["samples"][0]
    assert sample["prompt"] == "A story.\n" + STORIES[0][:18]
    assert sample["reference"] == [STORIES[0][18:]]
    (turn,) = sample["turns"]
    assert [segment[:2] for segment in turn["segments"]] == [[4, 3], [3, 3]]
    assert len(turn["ids"]) == 6
    assert document["rows"][1]["decode_tps"] is None
    assert document["rows"][1]["average_bits"] == pytest.approx((4 + 4 + 3 + 3 + 3) / 5)


def test_speed_is_measured_apart(
    demo_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_SETTLE_SECONDS", 0)
    report = tmp_path / "r.json"
    words = (
        demo_bundle, "--task", "jsonl", "--data", data, "--prompt-template", "{start}", "--max-new-tokens", 4, "-q",
        "--threads", 1, "--schedule", "static:3@1", "--schedule", "adaptive:2,4@1", "--speed", "--json", report,
    )  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert [line[-1] == "–" for line in table(result)[2:]] == [True, False, True]
    fp, mixed, adaptive = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert (fp["decode_tps"], adaptive["decode_tps"], adaptive["step_seconds"]) == (None, None, [])
    assert mixed["decode_tps"]["value"] > 0
    assert len(mixed["step_seconds"]) == 4
    assert "Prompts, unless a schedule says prefill: " in result.stdout

    def interrupted(*_: object, **__: object) -> object:
        return SimpleNamespace(cause=KeyboardInterrupt(), rows=())

    monkeypatch.setattr(runner, "measure_speed", interrupted)
    result = run(*words)
    assert (result.exit_code, result.stdout) == (130, "")


def test_prompts_beyond_the_context_are_left_out_and_counted(
    demo_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, report = tmp_path / "d.jsonl", tmp_path / "r.json"
    data.write_text("".join(json.dumps({"x": "a " * n}) + "\n" for n in (3, 3000)), encoding="utf-8")
    result = run(
        demo_bundle, "--task", "jsonl", "--data", data, "--prompt-template", "{x}", "--max-new-tokens", 2,
        "--schedule", "uniform:4", "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "1 of 2 prompts skipped" in caplog.text
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["environment"]["data"]["skipped"] == 1
    assert [len(row["samples"]) for row in document["rows"]] == [1, 1]


JSONL = ["--task", "jsonl", "--prompt-template", "{text}"]
MISTAKES = [
    (["--task", "dialogsumm"], "unknown task 'dialogsumm': choose one of dialogsum, "),
    (["--schedule", "uniform:5"], "unknown precision '5'"),
    (["--schedule", "static:2@4,3@8"], "never rise"),
    (["--schedule", "nonsense"], "unknown schedule 'nonsense'"),
    (["--data", "nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
    (["--limit", "0"], "limit must be 1 or more, got 0"),
    (["--max-new-tokens", "-3"], "max new tokens must be 1 or more, got -3"),
    (["--threads", "0"], "threads must be 1 or more, got 0"),
    (["--task", "jsonl"], "give --prompt-template"),
    (["--prompt-template", "no field"], "has no {field}"),
    (["--prompt-template", ""], "has no {field}"),
    (["--reference-backend", "optimus"], "unknown reference backend 'optimus': choose one of optimum, "),
    (["--reference-field", "x"], "--reference-field does not apply"),
    (["--chat"], "no chat template: leave --chat out"),
    (["--stride", "0"], "stride must be 1 or more, got 0"),
    (["--stride", "5000"], "windows of 1024 tokens with a stride of 5000: a stride is 1 to the window's length"),
    (["--task", "fidelity", "--stride", "3"], "--stride does not apply to this task: leave it out"),
    (["--metric", "bleu"], "--metric and --encoder do not apply to the task perplexity: leave them out"),
    (["--encoder", "x"], "--metric and --encoder do not apply to the task perplexity: leave them out"),
    ([*JSONL, "--metric", "rougeL,rougeX"], "unknown metric 'rougeX': choose one of rougeL"),
    ([*JSONL, "--metric", ""], "unknown metric '': choose one of"),
    ([*JSONL, "--metric", "bertscore"], "the metric bertscore needs an encoder: give a folder or hub id"),
    ([*JSONL, "--reference-field", "empty"], "stories.jsonl:1: the reference 'empty' is empty: remove the record"),
    (["--workers", "0"], "workers must be 1 or more, got 0"),
    (["--address", "nowhere"], "address 'nowhere': give HOST:PORT of a Ray cluster"),
    (["--speed", "--schedule", "adaptive:2,4@1"], "--speed measures static schedules, and there is none: add one"),
    (["--task", "iwslt"], "stories.jsonl:1: unknown field 'fr'"),
    (["--json", "no/such/folder/r.json"], "cannot write no/such/folder/r.json"),
    (["--html", "."], ". is a folder"),
    (["--prompt-template", "{dialogue}"], "stories.jsonl:1: unknown field 'dialogue': choose one of"),
    (["--task", "dialogsum"], "stories.jsonl:1: unknown field 'dialogue'"),
    (["--reference", "vicuna-8b"], "unknown model 'vicuna-8b'"),
    (["--max-new-tokens", "5000", "--task", "fidelity"], "longer than the context of 1024 tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_clear_line(
    demo_bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    from pmpd.eval.measure.reference import ReferenceCheckpoint

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(ReferenceCheckpoint, "load", too_late)
    result = run(demo_bundle, "--task", "perplexity", "--data", data, *arguments)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert (result.exit_code, result.stdout) == (1, "")


def test_a_folder_that_is_no_bundle(data: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "--task", "perplexity", "--data", data)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "bundle.json" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing argument 'BUNDLE' (see `pmpd-eval quality --help`)"),
        (["{bundle}"], "missing option '--task' (see `pmpd-eval quality --help`)"),
        (["{bundle}", "--task", "fidelity", "--peer", "llama.cpp:Q4_0"], "no such option '--peer'"),
        (["{bundle}", "--task", "speed", "--data", "x.jsonl"], "no such option '--data'"),
        (["speed", "{bundle}", "--html", "x.html"], "no such option '--html'"),
        (["speed"], "missing argument 'BUNDLE' (see `pmpd-eval speed --help`)"),
    ],
)
def test_usage(demo_bundle: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(bundle=demo_bundle) for argument in arguments))
    assert result.stderr.replace("option: --", "option '--").startswith(f"error: {message}")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_help_names_every_option_and_task() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for option in ("--task", "--data", "--schedule", "--limit", "--reference-backend", "--json", "--html"):
        assert option in result.stdout
    for task in TASKS:
        assert task in result.stdout
    assert "--prompt-tokens" in run("speed", "--help").stdout
