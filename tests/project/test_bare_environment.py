"""The runtime with numpy and onnxruntime and nothing else: in a virtual environment made for it."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE = """
import importlib.util, sys
import pmpd.runtime
from pmpd.runtime import Bundle, Generator, MissingExtraError, Tokenizer

for name in ("torch", "onnx", "transformers", "click", "tokenizers", "jinja2"):
    assert importlib.util.find_spec(name) is None, f"{name} is here: the environment is not bare"
bundle = Bundle.open(sys.argv[1])
(first, second) = Generator(bundle).stream([1, 426, 440], max_new_tokens=2)
try:
    Tokenizer.from_bundle(bundle)
except MissingExtraError as error:
    print(first.id, second.id, error)
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with numpy, onnxruntime and the repository."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    fetched = install(python, "--only-binary", ":all:", "--no-deps", *wanted)
    if fetched.returncode != 0:
        pytest.skip(f"pip cannot fetch {' and '.join(wanted)}: {fetched.stderr.strip().splitlines()[-1]}")
    installed = install(python, "--no-deps", str(REPOSITORY))
    assert installed.returncode == 0, installed.stderr
    return python


def install(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_tokens_come_out_of_a_bare_environment(bare_python: Path, demo_bundle: Path, tmp_path: Path) -> None:
    command = [str(bare_python), "-I", "-c", GENERATE, str(demo_bundle)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    first, second, message = process.stdout.split(maxsplit=2)
    assert int(first) > 0
    assert int(second) > 0
    assert message == "tokenizers is not installed: run `pip install 'pmpd[text]'`\n"


def test_command_names_the_extra_it_needs(bare_python: Path) -> None:
    command = [str(bare_python.with_name("pmpd-run")), "bundle"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert process.stderr == "error: click is not installed: run `pip install 'pmpd[text]'`\n"


def test_import_loads_only_numpy_and_no_other_package_of_ours() -> None:
    """Here everything is installed, so whatever was imported by accident would be found."""
    code = (
        "import sys; before = set(sys.modules); import pmpd.runtime; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)); "
        "print(*(name for name in sys.modules if name.startswith('pmpd.') and name.count('.') == 1))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    packages, ours = process.stdout.splitlines()
    assert set(packages.split()) <= {"numpy", "pmpd", "onnxruntime"}
    assert ours == "pmpd.runtime"
