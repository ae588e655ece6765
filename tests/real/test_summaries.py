"""A trained summarizer on real dialogues: what quantization and schedules cost, by `pmpd-eval` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pmpd.eval.cli import main

LIMIT = 12  # dialogues
TOKENS = 33


@pytest.fixture(scope="module")
def rows(
    dialog_bundle: Path, dialog_model: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The rows of one evaluation, by schedule; the unquantized model's is `fp`."""
    output = tmp_path_factory.mktemp("eval") / "result.json"
    schedules = [word for name in ("uniform:4", "uniform:2", "static:4@0,3@8,2@16") for word in ("--schedule", name)]
    arguments = [
        *(str(dialog_bundle), "--task", "dialogsum", "--data", str(dialogues), "--limit", str(LIMIT)),
        *("--reference", str(dialog_model), "--max-new-tokens", str(TOKENS), "--json", str(output), "-q", *schedules),
    ]
    with pytest.MonkeyPatch.context() as patch:  # what an earlier run has measured would be read again
        patch.setenv("XDG_CACHE_HOME", str(output.parent / "cache"))
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text(encoding="utf-8"))
    return {row["name"]: row for row in document["rows"]}


def rouge(row: Any) -> float:
    """Return the mean ROUGE-L of a row, in percent."""
    return float(row["metrics"]["rougeL"]["value"])


def test_four_bits_summarize_as_well_as_the_checkpoint(rows: dict[str, Any]) -> None:
    # 24.6 unquantized and 24.1 at 4 bits on 100 dialogues; a network that computes nonsense is below 10.
    assert rouge(rows["fp"]) > 15
    assert rouge(rows["uniform:4"]) > 15
    assert abs(rouge(rows["uniform:4"]) - rouge(rows["fp"])) < 6


def test_a_schedule_reads_fewer_bits(rows: dict[str, Any]) -> None:
    bits = {name: row["average_bits"] for name, row in rows.items()}
    assert bits["uniform:2"] == pytest.approx(2)
    assert bits["uniform:2"] < bits["static:4@0,3@8,2@16"] < bits["uniform:4"] == pytest.approx(4)
