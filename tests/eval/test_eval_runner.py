"""An evaluation that is cut short goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pmpd.eval import Settings, evaluate
from pmpd.eval.cli import main
from pmpd.eval.measure.examiner import BundleExaminer, Job, Measured, ReferenceExaminer, Setup, reference_file
from pmpd.eval.measure.reference import ReferenceCheckpoint
from pmpd.eval.report.results import QualityResults
from pmpd.eval.runner import prepare
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.console.command import Terminated

STARTS = ["Once upon a time, there was", "Tom had a red ball.", "One day, a small bird", "Sara and Ben went to"]
SCHEDULES = ("uniform:4", "static:3@0,2@2", "adaptive:2,4@1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "starts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in STARTS), encoding="utf-8")
    return file


@pytest.fixture
def settings(data: Path) -> Settings:
    """Of a task in which models answer, score the floating-point model's answers, and compare with its logits."""
    return Settings(task="fidelity", data=data, schedules=SCHEDULES, max_new_tokens=5, threads=1)


class Calls(list[tuple[str, tuple[str, ...]]]):
    """What examiners were asked: the item and the schedules; `at` says what to do before the nth job of the bundle."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, Callable[[], object]] = {}

    def taken(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return what came since the last time."""
        calls, self[:] = list(self), []
        return calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def counted(kind: type[BundleExaminer] | type[ReferenceExaminer]) -> None:
        measure = kind.__call__

        def called(self: Any, job: Job) -> Measured:
            number = sum("fp" not in schedules for _, schedules in calls)
            if kind is BundleExaminer and number in calls.at:
                calls.at.pop(number)()
            calls.extend((item.source, tuple(map(str, job.schedules))) for item in job.items)
            return measure(self, job)

        monkeypatch.setattr(kind, "__call__", called)

    counted(BundleExaminer)
    counted(ReferenceExaminer)
    return calls


def sources(*lines: int) -> list[str]:
    return [f"starts.jsonl:{line}" for line in lines]


def rows(results: QualityResults) -> Any:
    return json.loads(results.to_json())["rows"]


def interrupting(error: BaseException) -> Callable[[], None]:
    def interrupt() -> None:
        raise error

    return interrupt


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: finished samples are kept, and the same command goes on from there"),
        (Terminated(15), 143, "interrupted: finished samples are kept, and the same command goes on from there"),
        (PmpdError("not finite"), 1, "not finite"),
    ],
    ids=["Ctrl-C", "SIGTERM", "failure"],
)
def test_what_is_measured_is_not_measured_again(
    demo_bundle: Path,
    data: Path,
    settings: Settings,
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    report = tmp_path / "r.json"

    def run() -> Result:
        options = ["--task", "fidelity", "--data", data, "--max-new-tokens", 5, "--threads", 1, "--json", report, "-q"]
        words = [demo_bundle, *options, *(word for text in SCHEDULES for word in ("--schedule", text))]
        return CliRunner().invoke(main, [str(word) for word in words])

    calls.at[2] = interrupting(error)
    result = run()
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"error: {message}\n"
    assert not report.exists()
    asked = calls.taken()
    assert sorted(asked[:4]) == [(source, ("fp",)) for source in sources(1, 2, 3, 4)]
    assert asked[4:] == [(source, SCHEDULES) for source in sources(1, 2)]
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    assert calls.taken() == [(source, SCHEDULES) for source in sources(3, 4)]
    first = json.loads(report.read_text(encoding="utf-8"))
    assert run().exit_code == 0
    assert calls.taken() == []
    again = json.loads(report.read_text(encoding="utf-8"))
    assert again["rows"] == first["rows"]
    assert again["verdict"] == first["verdict"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert first["rows"] == rows(evaluate(Bundle.open(demo_bundle), settings))
    assert len(calls.taken()) == 8


def test_what_is_missing_is_measured_alone(
    demo_bundle: Path, settings: Settings, calls: Calls, cache: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(demo_bundle)
    task, _ = prepare(bundle, settings)
    checkpoint = ReferenceCheckpoint.find(bundle)
    ours = Setup(accuracy=bundle.manifest.accuracy).file(bundle, task, checkpoint.digest)
    theirs = reference_file(checkpoint, "transformers", task)
    whole = rows(evaluate(bundle, settings))
    calls.taken()
    assert sorted(cache.glob("*.jsonl")) == sorted([ours, theirs])
    logits = theirs.with_suffix("")
    assert len(list(logits.iterdir())) == len(STARTS)

    # A line that a kill cut off.
    ours.write_bytes(ours.read_bytes()[:-100])
    assert rows(evaluate(bundle, settings)) == whole
    assert calls.taken() == [(sources(4)[0], SCHEDULES)]

    # Logits that somebody has deleted: the floating-point model's item, and nothing of the bundle's.
    keys = [json.loads(line)["item"] for line in theirs.read_text(encoding="utf-8").splitlines()]
    (logits / f"{keys[1]}.npy").unlink()
    assert rows(evaluate(bundle, settings)) == whole
    ((_, schedules),) = calls.taken()
    assert schedules == ("fp",)
    assert (logits / f"{keys[1]}.npy").is_file()

    # One more schedule, one more record, and half-written logits of a process that was killed.
    (logits / f"{keys[0]}.77.part").write_bytes(b"half")
    more = replace(settings, schedules=(*SCHEDULES, "uniform:2"))
    assert rows(evaluate(bundle, more))[:-1] == whole
    assert calls.taken() == [(source, ("uniform:2",)) for source in sources(1, 2, 3, 4)]
    with settings.data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "The dog saw"}) + "\n")
    evaluate(bundle, settings)
    assert calls.taken() == [(sources(5)[0], ("fp",)), (sources(5)[0], SCHEDULES)]

    # A part of it, in another order.
    settings.data.write_text("".join(json.dumps({"prompt": STARTS[i]}) + "\n" for i in (3, 0)), encoding="utf-8")
    few = rows(evaluate(bundle, settings))
    assert calls.taken() == []
    for row, all_of in zip(few, whole, strict=True):
        turns = [[sample["turns"] for sample in each["samples"]] for each in (row, all_of)]
        assert turns[0] == [turns[1][3], turns[1][0]]


def test_other_metrics_are_of_the_same_answers(demo_bundle: Path, data: Path, calls: Calls) -> None:
    pytest.importorskip("sacrebleu")
    settings = Settings(
        task="jsonl", data=data, prompt_template="{prompt}", max_new_tokens=5, schedules=("uniform:2",), threads=1
    )
    bundle = Bundle.open(demo_bundle)
    first = evaluate(bundle, settings)
    assert len(calls.taken()) == 2 * len(STARTS)
    second = evaluate(bundle, replace(settings, metrics=("bleu", "rouge1")))
    assert calls.taken() == []
    assert [metric.name for metric in second.metrics] == ["bleu", "rouge1"]
    assert second.rows[1].metrics["rouge1"] == first.rows[1].metrics["rouge1"]
    assert second.environment["metrics"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:none")
    # References, too, are no part of what was asked.
    evaluate(bundle, replace(settings, reference_field="prompt"))
    assert calls.taken() == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 6},
        {"task": "jsonl", "prompt_template": "{prompt}"},
        {"accuracies": ("exact",)},
        {"reference_backend": "optimum"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_samples_depend_on_is_in_the_name_of_their_file(
    demo_bundle: Path, settings: Settings, change: dict[str, Any]
) -> None:
    bundle, checkpoint = Bundle.open(demo_bundle), ReferenceCheckpoint.find(Bundle.open(demo_bundle))

    def files(settings: Settings) -> tuple[Path, Path]:
        task, _ = prepare(bundle, settings)
        setup = Setup(accuracy=next(iter(settings.accuracies), None))
        return (
            setup.file(bundle, task, checkpoint.digest),
            reference_file(checkpoint, settings.reference_backend, task),
        )

    ours, theirs = files(settings)
    assert files(settings) == (ours, theirs)
    changed = files(replace(settings, **change))
    assert (changed[0] == ours) is ("reference_backend" in change)
    assert (changed[1] == theirs) is ("accuracies" in change)


def test_answers_of_a_task_that_compares_with_nobody_do_not_depend_on_the_reference(
    demo_bundle: Path, data: Path, settings: Settings
) -> None:
    bundle = Bundle.open(demo_bundle)
    answers, _ = prepare(bundle, replace(settings, task="jsonl", prompt_template="{prompt}"))
    fidelity, _ = prepare(bundle, settings)
    assert Setup().file(bundle, answers, "a") == Setup().file(bundle, answers, "b")
    assert Setup().file(bundle, fidelity, "a") != Setup().file(bundle, fidelity, "b")


def test_schedules_of_a_bundle_and_its_readme_change_no_sample(demo_bundle: Path, settings: Settings) -> None:
    bundle = Bundle.open(demo_bundle)
    task, _ = prepare(bundle, settings)
    manifest = bundle.manifest
    entry = manifest.files["README.md"]
    files = {**manifest.files, "README.md": replace(entry, sha256="0" * 64), "schedules/learned-0.onnx": entry}
    told = Bundle(bundle.path, replace(manifest, files=files))
    assert Setup().file(told, task) == Setup().file(bundle, task)
    files["decode-2.onnx"] = replace(files["decode-2.onnx"], sha256="0" * 64)
    other = Bundle(bundle.path, replace(manifest, files=files))
    assert Setup().file(other, task) != Setup().file(bundle, task)


# Runs the command, and kills its process with SIGKILL: inside or after the nth time that samples are kept.
KILLED = """
import os, signal, sys
from pmpd.eval.cli import main
from pmpd.eval.measure import samples

when, count = sys.argv.pop(1).split("@")
keep, calls = samples.Samples._keep, 0


def killing(self, keys, measured):
    global calls
    calls += 1
    keep(self, keys, measured)
    if calls == int(count):
        if when == "inside":
            os.truncate(self._path, self._path.stat().st_size - 100)
        os.kill(os.getpid(), signal.SIGKILL)


samples.Samples._keep = killing
sys.argv[0] = "pmpd-eval"
main()
"""
# The floating-point model's samples are kept at once, the bundle's one by one: what each kill leaves, of both.
MOMENTS = {"inside@1": (3, 0), "after@2": (4, 1), "inside@2": (4, 2)}


@pytest.mark.full
def test_killed_at_any_moment(
    demo_bundle: Path, data: Path, settings: Settings, calls: Calls, cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options: list[object] = ["--task", "fidelity", "--data", data, "--max-new-tokens", 5, "--threads", 1, "-q"]
    words = [demo_bundle, *options, *(word for text in SCHEDULES for word in ("--schedule", text))]
    for moment, (theirs, ours) in MOMENTS.items():  # each run goes on where the one before was killed
        process = subprocess.run(
            [sys.executable, "-c", KILLED, moment, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert (process.returncode, process.stdout) == (-signal.SIGKILL, ""), process.stderr
        kept = [name for file in cache.glob("*.jsonl") for name in names_in(file)]
        assert (kept.count(("fp",)), kept.count(SCHEDULES)) == (theirs, ours), moment
    resumed = rows(evaluate(Bundle.open(demo_bundle), settings))
    assert [schedules for _, schedules in calls.taken()] == [SCHEDULES] * 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert resumed == rows(evaluate(Bundle.open(demo_bundle), settings))


def names_in(file: Path) -> list[tuple[str, ...]]:
    """Return the rows of each line that is whole."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(tuple(json.loads(line)["samples"]))
        except ValueError:  # cut off
            continue
    return lines


def test_importing_starts_no_logging_and_needs_no_package_of_a_metric() -> None:
    """rouge-score configures the root logger when it is first used: each line of ours would come twice."""
    check = "import logging, sys, pmpd.eval.cli, pmpd.eval.runner; print(logging.root.handlers, *sys.modules)"
    process = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, env=os.environ)
    handlers, _, modules = process.stdout.partition(" ")
    assert handlers == "[]"
    assert not {"rouge_score", "sacrebleu", "torch", "ray"} & set(modules.split())
