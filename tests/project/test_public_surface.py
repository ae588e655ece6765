"""What is public is listed, and imports point one way."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Which of our packages each may import, beside itself.
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": set(),
    "tvm_kernels": {"runtime"},
    "exporter": {"runtime", "tvm_kernels"},
    "eval": {"runtime", "exporter"},
    "npu_backend": {"runtime", "exporter"},
}
# Modules that are run, not imported: their surface is the command line.
COMMANDS = {
    f"pmpd.{name}" for name in ("runtime.cli", "exporter.cli", "exporter.demo.train", "eval.cli", "npu_backend.cli")
}
# Modules that need a package which `dev` does not have.
NEEDS = {"pmpd.eval.harness.model": "lm_eval"}
SOURCES = {
    ".".join(["pmpd", *path.relative_to(REPOSITORY).with_suffix("").parts]).removesuffix(".__init__"): path
    for package in MAY_IMPORT
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


def syntax_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def test_modules_are_found() -> None:
    assert {f"pmpd.{package}" for package in MAY_IMPORT} < set(SOURCES)
    assert set(SOURCES) > COMMANDS


@pytest.mark.parametrize("name", sorted(set(SOURCES) - COMMANDS))
def test_public_classes_and_functions_are_listed(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module = importlib.import_module(name)
    if not [node for node in syntax_of(name).body if not isinstance(node, ast.Expr)]:
        return  # a room: its docstring says what lives in it
    assert hasattr(module, "__all__"), f"{name} has no __all__: list in it what other modules may import"
    for listed in module.__all__:
        assert hasattr(module, listed), f"{name}.__all__ lists {listed!r}, which does not exist: correct or remove it"
    defined = {node.name for node in syntax_of(name).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stray = sorted(key for key in defined - set(module.__all__) if not key.startswith("_"))
    assert not stray, (
        f"{name} defines {', '.join(stray)} and does not list it: "
        "add it to __all__ if other modules may use it, or put an underscore in front if not"
    )


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_one_way(name: str) -> None:
    package = name.split(".")[1]
    for node in ast.walk(syntax_of(name)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: write the import in full, from pmpd.{package}"
            imported = [node.module or ""]
        ours = {part.split(".")[1] for part in imported if part.startswith("pmpd.")}
        assert ours <= {package, *MAY_IMPORT[package]}, (
            f"{name} imports {', '.join(imported)}: {package} may import {sorted(MAY_IMPORT[package]) or 'no other'} "
            "package of ours; move what it needs to where it may find it"
        )
