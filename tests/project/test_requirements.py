"""Third-party packages: what each of ours imports is what its extra installs, and nothing is listed for no use."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The extras that a package of ours is installed with.
EXTRAS = {
    "runtime": ("cpu", "text"),
    "exporter": ("cpu", "export", "tune"),
    "tvm_kernels": ("cpu", "tune", "export"),
    "eval": ("cpu", "eval", "baseline", "harness", "distributed"),
    "npu_backend": ("npu", "export"),
}
# Modules whose distribution has another name.
DISTRIBUTIONS = {
    **{"onnx_ir": "onnx-ir", "tvm": "apache-tvm", "rouge_score": "rouge-score", "optimum": "optimum-onnx"},
    **{"huggingface_hub": "huggingface_hub", "google": "protobuf"},
}
# Peers to compare with: the user installs them, and `pmpd-eval` says how.
PEERS = {"llama_cpp", "onnxruntime_genai"}
# Listed without an import of ours: another package imports it, or it is run as a program.
INDIRECT = {"onnxruntime-gpu", "protobuf", "sentencepiece", "ziglang"}


def requirements(*extras: str) -> set[str]:
    """Return the names of the distributions that some extras install, those of the package itself included."""
    names: set[str] = set()
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    for requirement in (line for lines in lists for line in lines):
        name, _, inner = re.fullmatch(r"([\w.-]+)(\[([\w,]+)\])?.*", requirement).group(1, 2, 3)  # type: ignore[union-attr]
        names |= requirements(*inner.split(",")) if name == "pmpd" else {name}
    return names


def imported(package: str) -> set[str]:
    """Return the distributions that a package of ours imports anywhere."""
    modules: set[str] = set()
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    outside = modules - set(sys.stdlib_module_names) - {"pmpd"} - PEERS
    return {DISTRIBUTIONS.get(module, module) for module in outside}


@pytest.mark.parametrize("package", EXTRAS)
def test_imports_are_installed_by_an_extra(package: str) -> None:
    missing = imported(package) - requirements(*EXTRAS[package])
    assert not missing, (
        f"{package} imports {', '.join(sorted(missing))}, which none of the extras {EXTRAS[package]} installs: "
        "add it to pyproject.toml"
    )


def test_requirements_are_imported() -> None:
    extras = [extra for extra in PROJECT["optional-dependencies"] if extra != "dev"]
    used = set().union(*(imported(package) for package in EXTRAS)) | INDIRECT
    unused = {name for name in requirements(*extras) if name not in used}
    assert not unused, f"pyproject.toml lists {', '.join(sorted(unused))} and nothing of ours imports it: remove it"
