"""How to repeat an evaluation: its command line with every setting, hashes of what it read, and where it ran."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["facts", "hashes", "repeat_command"]

_LINE = 76  # characters
_REPEATED = {"schedules": "schedule", "accuracies": "accuracy", "metrics": "metric"}
# Where it ran, and what the line begins with.
_LEFT_OUT = {"task", "data", "address"}


def repeat_command(environment: Mapping[str, Any]) -> str:
    r"""Return the command line of an evaluation, with defaults as they were; files have their names without folders.

    Long lines are broken before an option, with a backslash at the end.
    """
    settings = {**environment["settings"], "threads": environment["threads"]}
    words = [["pmpd-eval", environment["bundle"]["name"]], ["--task", settings["task"]], ["--data", settings["data"]]]
    for name, value in settings.items():
        if name not in _LEFT_OUT:
            words += _option(_REPEATED.get(name, name).replace("_", "-"), value)
    lines = [""]
    for part in map(shlex.join, words):
        if lines[-1] and len(lines[-1]) + len(part) >= _LINE:
            lines.append("  ")
        lines[-1] += part if not lines[-1].strip() else f" {part}"
    return " \\\n".join(lines)


def _option(name: str, value: Any) -> list[list[str]]:
    if isinstance(value, bool):
        return [[f"--{name}"]] if value else [["--no-chat"]] if name == "chat" else []
    if isinstance(value, list | tuple):
        return [[f"--{name}", str(choice)] for choice in value]
    return [] if value is None else [[f"--{name}", str(value)]]


def hashes(environment: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what was read, its file, and the file's SHA-256 in hex; ``bundle.json`` has those of a bundle's files."""
    yield "data", environment["data"]["name"], environment["data"]["sha256"]
    yield "bundle", f"{environment['bundle']['name']}/bundle.json", environment["bundle"]["sha256"]
    for name, digest in environment["reference"].get("weights", {}).items():
        yield "fp model", f"{environment['reference']['name']}/{name}", digest


def facts(environment: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings with their dotted names, behind `path`, as text."""
    if isinstance(environment, dict) and environment:
        for key, value in environment.items():
            yield from facts(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, environment if isinstance(environment, str) else json.dumps(environment, ensure_ascii=False)
