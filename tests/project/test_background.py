"""Tests under ignored signals: SIGINT in the background and in many CI services, SIGHUP below nohup."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted(TESTS.rglob("test_*.py")) if path != Path(__file__)]


def ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def functions_that_interrupt(path: Path) -> dict[str, bool]:
    """Return the tests of a file that name SIGINT, and whether they are marked `interruptible`."""
    source = path.read_text(encoding="utf-8")
    return {
        node.name: any("interruptible" in ast.unparse(decorator) for decorator in node.decorator_list)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and "SIGINT" in ast.unparse(node)
    }


def test_tests_that_interrupt_are_marked() -> None:
    names = {
        f"{path.name}::{name}": marked for path in FILES for name, marked in functions_that_interrupt(path).items()
    }
    assert names, "no test sends SIGINT any more"
    unmarked = [name for name, marked in names.items() if not marked]
    assert not unmarked, f"{', '.join(unmarked)}: mark with @pytest.mark.interruptible, or they fail in the background"


@pytest.mark.full
def test_interrupting_tests_pass_in_the_background() -> None:
    files = [str(path) for path in FILES if functions_that_interrupt(path)]
    command = [sys.executable, "-m", "pytest", "-m", "interruptible and not slow", *files]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=ignore_interrupts,
        cwd=TESTS.parent,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout
