"""Rules that CONTRIBUTING states and no linter knows: words, names of variables, length of files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "exporter", "tvm_kernels", "eval", "npu_backend")
LONGEST = 500  # lines of a file
TEXT = {".py", ".c", ".h", ".md", ".toml", ".jinja", ".css", ".txt", ".yaml", ""}

# Phrases that do not read as English, and what to write instead.
WORDS = {
    r"\bmend(s|ed|ing)?\b": "fix, correct, repair",
    r"\bgo(es)? by\b": "use, follow, fall back to",
    r"\basks? ahead\b": "prefetch",
    r"\bfrom whom\b": "from sources you trust",
    r"(?<!there )\bis no (file|bundle|text|folder)\b": "is not a file (bundle, text, folder)",
    r"\bso many (tokens|steps|digits)\b": "N tokens (steps, digits)",
    r"\bnothing to speak of\b": "almost nothing, nearly free",
    r"\bunasked\b": "unconditionally",
    r"\blie behind each other\b": "are stored contiguously",
}
PRONOUNS = {"own", "each", "found", "given", "made", "some", "rest", "it", "keep", "put", "one", "mark"}


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


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def variables(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a file gives to variables and parameters, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in tracked_files()}
    long = [
        f"{path.relative_to(REPOSITORY)} ({length} lines)"
        for path, length in lengths.items()
        if length > LONGEST and path.suffix in {".py", ".c", ".h"} and "third_party" not in path.parts
    ]
    assert not long, f"longer than {LONGEST} lines: {', '.join(long)}: split what does two things"


@pytest.mark.parametrize("pattern", WORDS)
def test_words_are_plain_english(pattern: str) -> None:
    expression = re.compile(pattern, re.IGNORECASE)
    places = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if expression.search(line) and not line.startswith("Bad:")  # examples in CONTRIBUTING
    ]
    assert not places, f"write {WORDS[pattern]} instead of {pattern}:\n" + "\n".join(places)


def test_variables_are_named_for_what_they_hold() -> None:
    places = [
        f"{path.relative_to(REPOSITORY)}:{line}: {variable}"
        for path in sources()
        for variable, line in variables(ast.parse(path.read_text(encoding="utf-8")))
        if variable in PRONOUNS
    ]
    assert not places, "variables named with a pronoun: name them for what they hold:\n" + "\n".join(places)
