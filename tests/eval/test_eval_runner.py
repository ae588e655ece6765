"""An evaluation that is cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pmpd.eval import Settings, evaluate
from pmpd.eval.cli import main
from pmpd.eval.measure.models import Forced, Scheduled
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.console.command import Terminated


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time there was a girl. She had a red ball and a small dog.", encoding="utf-8")
    return file


@pytest.fixture(
    params=[(KeyboardInterrupt(), 130), (Terminated(15), 143), (PmpdError("not finite"), 1)],
    ids=["Ctrl-C", "SIGTERM", "failure"],
)
def interrupt(request: pytest.FixtureRequest) -> tuple[BaseException, int]:
    """What cuts an evaluation short, and the exit code that it leads to."""
    exception, code = request.param
    return exception, code


@pytest.fixture(params=[2, 0], ids=["after one schedule", "before any"])
def patience(
    request: pytest.FixtureRequest, interrupt: tuple[BaseException, int], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Interrupted at 3 bits, or at 4."""
    force = Scheduled.force

    def interrupted(self: Scheduled, prompt: Any, answer: Any) -> Forced:
        if self._schedule.precision(0) <= request.param + 1 or request.param == 0:
            raise interrupt[0]
        return force(self, prompt, answer)

    monkeypatch.setattr(Scheduled, "force", interrupted)
    return int(request.param)


def test_finished_rows_are_kept(demo_bundle: Path, data: Path, patience: int) -> None:
    settings = Settings(task="perplexity", data=data, max_new_tokens=4, limit=2, threads=1)
    if not patience:
        with pytest.raises((KeyboardInterrupt, PmpdError)):
            evaluate(Bundle.open(demo_bundle), settings)
        return
    results = evaluate(Bundle.open(demo_bundle), settings)
    assert [row.name for row in results.rows] == ["fp", "uniform:4"]
    assert results.unfinished == ("uniform:3", "uniform:2")


def test_the_command_writes_them_and_says_so(
    demo_bundle: Path, data: Path, tmp_path: Path, patience: int, interrupt: tuple[BaseException, int]
) -> None:
    report = tmp_path / "r.json"
    arguments = [str(demo_bundle), "--task", "perplexity", "--data", str(data), "--max-new-tokens", "4", "--limit", "2"]
    result = CliRunner().invoke(main, [*arguments, "-q", "--json", str(report)])
    assert result.exit_code == interrupt[1]
    assert report.exists() == bool(patience)
    if patience:
        assert "| uniform:4 |" in result.stdout
        assert json.loads(report.read_text(encoding="utf-8"))["unfinished"] == ["uniform:3", "uniform:2"]
        assert "2 of 4 rows are finished" in result.stderr
        assert result.stderr.startswith("error: not finite; " if interrupt[1] == 1 else "error: interrupted: ")
        assert "uniform:3, uniform:2" in result.stderr
