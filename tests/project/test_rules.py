"""Rules that CONTRIBUTING states and no linter knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST = 500  # lines of a file
TEXT = {".py", ".c", ".h", ".md", ".toml", ".jinja", ".css", ".txt", ".yaml", ""}


def tracked_files() -> list[Path]:
    """Return the project's text files, those that are not yet committed too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    paths = [REPOSITORY / name for name in listed if name]
    data = ("exporter/demo/model", "tests/golden", "CHANGELOG.md", "LICENSE")  # the changelog quotes what was
    return [
        path
        for path in paths
        if path.is_file()
        and path.suffix in TEXT
        and path != Path(__file__)
        and not path.relative_to(REPOSITORY).as_posix().startswith(data)
    ]


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in tracked_files()}
    long = [
        f"{path.relative_to(REPOSITORY)} ({length} lines)"
        for path, length in lengths.items()
        if length > LONGEST and path.suffix in {".py", ".c", ".h"} and "third_party" not in path.parts
    ]
    assert not long, f"longer than {LONGEST} lines: {', '.join(long)}: split what does two things"
