"""Where low precision errs, on the demo model: shares that must hold of any model, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pmpd.eval.recipes.unsure import main

STORIES = ["Once upon a time there was", "Tom had a red ball and", "A small bird sat on a big"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"start": story}) + "\n" for story in STORIES), encoding="utf-8")
    return file


def run(bundle: Path, data: Path, *words: object) -> Result:
    options = ("--task", "jsonl", "--data", data, "--prompt-template", "{start}", "--threads", 1, "-q", *words)
    return CliRunner().invoke(main, [str(bundle), *map(str, options)])


def test_shares_of_steps(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    result = run(demo_bundle, data, "--max-new-tokens", 16, "--low", 2, "--json", report)
    assert result.exit_code == 0, result.stderr
    shares = json.loads(report.read_text(encoding="utf-8"))
    assert (shares["high"], shares["low"], shares["nats"]) == (4, 2, 1)
    columns = [shares[name] for name in ("wrong", "unsure", "both", "behind")]
    assert all(len(column) == len(STORIES) for column in columns)
    assert all(0 <= both <= min(wrong, unsure) <= 1 for wrong, unsure, both, _ in zip(*columns, strict=True))
    assert sum(shares["wrong"]) > 0
    assert "| 2 bits choose another token " in result.stdout


def test_the_same_precision_never_errs(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    assert run(demo_bundle, data, "--max-new-tokens", 9, "--low", 4, "--json", report).exit_code == 0
    shares = json.loads(report.read_text(encoding="utf-8"))
    assert shares["wrong"] == shares["behind"] == [0] * len(STORIES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--low", 5), "unknown precision '5.0': choose one of 4, 3, 2"),
        (("--max-new-tokens", 1), "all answers have one token, so there is no decode step: use other prompts"),
    ],
)
def test_bad_input_is_one_line(demo_bundle: Path, data: Path, words: tuple[object, ...], message: str) -> None:
    result = run(demo_bundle, data, *words)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [f"error: {message}"]
