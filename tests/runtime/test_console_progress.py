"""Progress: a bar on a terminal, lines elsewhere, nothing where nobody asked for notes."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from pmpd.runtime.console import progress as module
from pmpd.runtime.console.palette import SHADES, shade_of, shades
from pmpd.runtime.console.progress import progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def notes() -> Iterator[None]:
    """Make notes visible, as the command frame does."""
    logger = logging.getLogger("pmpd")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def test_elsewhere_a_step_is_a_line_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", step="[1/2] quantize", total=3)) == ["a", "b", "c"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[1/2\] quantize 3/3, .+/.+, 00:00, 00:00 left", line)


def test_elsewhere_a_long_step_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY", 0)
    for letter in track("abc", step="quantize", total=3):
        assert letter
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()][:2] == ["quantize 1/3", "quantize 2/3"]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("train", total=1, unit="step") as shown:
        shown.expect(4)
        shown.describe("train more")
        shown.note("loss 1.5")
        shown.advance(4)
    *_, last = terminal.getvalue().strip("\n").split("\r")
    assert re.search(r"\[.{24}\] train more 4/4, .*step.*, loss 1\.5", last)


def test_a_transient_bar_leaves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("ab", step="compile", total=2, transient=True)) == ["a", "b"]
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track("ab", step="compile", total=2, transient=True)) == ["a", "b"]
    assert "\n" not in terminal.getvalue()


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_without_notes_there_is_no_progress(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("pmpd").setLevel(level)
    with progress("step", total=2) as shown:
        shown.advance()
        shown.describe("other")
        shown.note("text")
        shown.expect(3)
    assert list(track("ab", step="step", total=2)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), progress("step", total=2):
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_high_precision_is_cool_and_low_precision_is_warm() -> None:
    assert shades(8) == SHADES
    assert [shade.name for shade in shades(2)] == ["blue", "red"]
    assert shades(1) == SHADES[:1]
    assert [shade_of(bits, (2, 4, 3)).name for bits in (4, 3, 2)] == ["blue", "yellow", "red"]
    for count in range(1, 9):
        assert len(set(shades(count))) == count
