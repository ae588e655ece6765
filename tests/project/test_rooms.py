"""Imports between the rooms of a package point one way: from the later ones of its list to the earlier ones.

A room is a folder or a file at the top of a package. `__init__` is the package's public surface.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Rooms from the ground up: each may import from those before it.
ROOMS: dict[str, tuple[str, ...]] = {
    "runtime": ("errors", "console", "format", "engine", "schedule", "chat", "text", "decode", "__init__", "cli"),
    "tvm_kernels": ("targets", "models", "codegen", "ops", "library", "__init__", "bench", "tuning"),
    "exporter": (
        *("documents", "demo", "source", "graph", "nn", "arch", "onnx_model", "quantize", "allocate", "bundle"),
        *("config", "calibrate", "tune", "outline", "verify", "memory", "skeleton", "pipeline", "__init__", "cli"),
    ),
    "eval": (
        "data",
        "sandbox",
        "metrics",
        "tasks",
        "measure",
        "harness",
        "report",
        "speed",
        "settings",
        "runner",
        "solve",
        "peers",
        "methods",
        "recipes",
        "__init__",
        "cli",
    ),
    "npu_backend": ("hardware", "machine", "program", "study", "recipes", "__init__", "cli"),
}
# Files that import against the order. This list only gets shorter: a file that no longer does must be removed from it.
AGAINST_THE_ORDER: dict[str, set[str]] = {}


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, with the names taken from them: those may be modules too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(package: str, module: str) -> str | None:
    """Return the room of a package that a module is in; None for one of another package."""
    top, _, rest = module.partition(f"pmpd.{package}.")
    if top or not rest:
        return None
    room = rest.partition(".")[0]
    folder = REPOSITORY / package
    return room if (folder / room).is_dir() or (folder / f"{room}.py").is_file() else "__init__"


def files_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_listed(package: str) -> None:
    rooms = {path.relative_to(REPOSITORY / package).parts[0].removesuffix(".py") for path in files_of(package)}
    assert rooms == set(ROOMS[package]), (
        f"the rooms of {package} are not those that ROOMS in {Path(__file__).name} lists: "
        f"add {sorted(rooms - set(ROOMS[package]))} at their place, remove {sorted(set(ROOMS[package]) - rooms)}"
    )


@pytest.mark.parametrize("package", ROOMS)
def test_imports_between_rooms_point_one_way(package: str) -> None:
    order = ROOMS[package]
    against: dict[str, set[str]] = {}
    for path in files_of(package):
        room = path.relative_to(REPOSITORY / package).parts[0].removesuffix(".py")
        rooms = {room_of(package, module) for module in imports_of(path)} - {None, room}
        later = {other for other in rooms if other is not None and order.index(other) > order.index(room)}
        if later:
            against[path.relative_to(REPOSITORY).as_posix()] = later
    known = {file: rooms for file, rooms in AGAINST_THE_ORDER.items() if file.startswith(f"{package}/")}
    assert against == known, (
        f"imports of {package} against the order {' → '.join(order)}: move what is imported to an earlier room, "
        "or shorten AGAINST_THE_ORDER if one of its files is now right"
    )
