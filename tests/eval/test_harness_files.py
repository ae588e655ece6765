"""What is beside the harness and needs no harness: arguments, pairs of runs, and a missing package."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pmpd.eval.harness.arguments import GenerationArguments
from pmpd.eval.harness.paired import compare_runs, main
from pmpd.runtime import PmpdError


def test_generation_arguments_are_those_of_the_harness() -> None:
    read = GenerationArguments.read
    assert read({}, default_tokens=7) == GenerationArguments(until=(), max_tokens=7)
    assert read({"until": "\n\n", "max_gen_toks": 3, "max_tokens": 5}, default_tokens=7) == GenerationArguments(
        until=("\n\n",), max_tokens=3
    )
    stated = {"until": ["a", "", "b"], "do_sample": False, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    assert read(stated, default_tokens=7) == GenerationArguments(until=("a", "b"), max_tokens=5)
    assert read({"temperature": 0.0}, default_tokens=7).max_tokens == 7


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"do_sample": True}, r"asks for sampling .* --gen_kwargs do_sample=False"),
        ({"temperature": 0.8}, "asks for sampling"),
        ({"num_beams": 4}, "asks for num_beams=4"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number of 1 or more, got 0"),
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number of 1 or more, got 'many'"),
        ({"until": [3]}, r"until must be a text or a list of texts, got \(3,\)"),
    ],
)
def test_arguments_that_are_not_greedy_decoding(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        GenerationArguments.read(stated, default_tokens=7)


def write_run(folder: Path, documents: list[dict[str, Any]], *, date: str = "2026-11-28T10-00-00.000001") -> Path:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    lines = [{"doc_id": number, "filter": "none", "metrics": list(d), **d} for number, d in enumerate(documents)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "model" / f"samples_task_a_{date}.jsonl").write_text(text, encoding="utf-8")
    return folder


def document(accuracy: int, log_likelihood: int, words: int) -> dict[str, Any]:
    both = {"word_perplexity": [log_likelihood, words], "bits_per_byte": [log_likelihood, 5 * words]}
    return {"acc": accuracy, **both, "bleu": ["a", "b"]}


def test_runs_are_compared_pair_by_pair(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", [document(1, -20, 10), document(0, -90, 30)])
    write_run(first, [{"acc": 9.0}], date="2026-11-27T10-00-00.000001")  # an older run: of no account
    second = write_run(tmp_path / "second", [document(1, -21, 10), document(1, -93, 30), document(1, -50, 20)])
    accuracy, bits, words = compare_runs(first, second)
    assert (accuracy.metric, bits.metric, words.metric) == ("acc", "bits_per_byte", "word_perplexity")
    assert (accuracy.task, accuracy.first.value, accuracy.second.value, accuracy.difference.value) == (
        "task_a",
        0.5,
        1,
        0.5,
    )
    assert accuracy.difference.count == 2
    assert words.first.value == pytest.approx(math.exp(110 / 40))  # as the harness: of all words together
    assert words.second.value == pytest.approx(math.exp(114 / 40))
    assert bits.difference.value == pytest.approx(4 / 200 / math.log(2))
    assert bits.difference.ci95 == pytest.approx(0, abs=1e-9)  # both lose the same per byte
    output = CliRunner().invoke(main, [str(first), str(second)]).output
    assert "| task_a" in output
    assert f"+0.5000 ± {accuracy.difference.ci95:.4f}" in output
    assert 4 < accuracy.difference.ci95 < 9  # Student's t of two documents: 6.36


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"acc": 1.0}])
    with pytest.raises(PmpdError, match=r"run the harness with --log_samples --output_path"):
        compare_runs(run, tmp_path / "nothing")
    other = write_run(tmp_path / "other", [])
    with pytest.raises(PmpdError, match="no documents of one task in common"):
        compare_runs(run, other)


def test_command_says_what_to_install() -> None:
    code = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name == "lm_eval":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
from pmpd.eval.harness.cli import main
main(["--tasks", "x"])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert process.stderr == "error: lm_eval is not installed: run `pip install 'pmpd[harness]'`\n"
