"""The wheel: what is in it, and that it works away from the checkout, in environments made for it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "exporter", "tvm_kernels", "eval", "npu_backend")
# What is read at run time and is not Python: each pattern must match in a package, and every match must be installed.
DATA = (
    "exporter/demo/model/*",
    "exporter/demo/openings.jsonl",
    "tvm_kernels/models/configs/*.json",
    "tvm_kernels/**/records/*.json",
    "tvm_kernels/ort_ops/**/*.c",
    "tvm_kernels/ort_ops/**/*.h",
    "tvm_kernels/bench/sweep.c",
    "eval/data/python_problems.jsonl",
    "eval/report/page.css",
    "eval/report/page.html.jinja",
    "npu_backend/hardware/hw/*.toml",
)
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

Once = Callable[[str, Callable[[Path], object]], Path]


def run(*command: str | Path, cwd: Path | None = None, seconds: float = 500) -> subprocess.CompletedProcess[str]:
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=seconds, check=False)


def output_of(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command that must succeed, and return its standard output."""
    process = run(*command, cwd=cwd)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def environment(folder: Path) -> Path:
    """Make a virtual environment with pip and nothing else, and return its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="session")
def wheel(once: Once) -> Path:
    def build(folder: Path) -> None:
        output_of(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, REPOSITORY)

    (path,) = once("wheel", build).glob("*.whl")
    return path


@pytest.fixture(scope="session")
def bare_python(once: Once, wheel: Path) -> Path:
    """The interpreter of an environment with numpy, onnxruntime and the wheel."""

    def build(folder: Path) -> None:
        python = environment(folder / "venv")
        needed = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
        fetched = install(python, "--only-binary", ":all:", "--no-deps", *needed)
        if fetched.returncode != 0:
            pytest.skip(f"pip cannot fetch {' and '.join(needed)}: {fetched.stderr.strip().splitlines()[-1]}")
        installed = install(python, "--no-deps", wheel)
        assert installed.returncode == 0, installed.stderr

    return once("bare", build) / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def full_python(once: Once, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel, over the packages installed here but without the checkout."""

    def build(folder: Path) -> None:
        python = environment(folder / "venv")
        packages = output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # Added as plain paths: `.pth` files there, such as the one of an editable install, are not read.
        paths = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
        (Path(packages) / "here.pth").write_text("\n".join(paths), encoding="utf-8")
        installed = install(python, "--no-deps", "--force-reinstall", wheel)
        assert installed.returncode == 0, installed.stderr

    return once("full", build) / "venv" / "bin" / "python"


def files_wanted() -> set[str]:
    """Return the paths, below the checkout, of all files that an installed package needs."""
    code = {path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}
    data: set[Path] = set()
    for pattern in DATA:
        matches = {path for path in REPOSITORY.glob(pattern) if path.is_file()}
        assert matches, f"nothing matches {pattern}: correct DATA in {Path(__file__).name}"
        data |= matches
    return {path.relative_to(REPOSITORY).as_posix() for path in code | data}


def test_the_wheel_has_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("pmpd/") for name in archive.namelist() if name.startswith("pmpd/")}
    assert files_wanted() - names == set()
    assert "__init__.py" not in names, "pmpd is a namespace package"


def test_the_source_distribution_has_every_file(tmp_path: Path) -> None:
    backend = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    python = environment(tmp_path / "venv")
    installed = install(python, "scikit-build-core>=0.10")
    if installed.returncode != 0:
        pytest.skip(f"pip cannot fetch scikit-build-core: {installed.stderr.strip().splitlines()[-1]}")
    output_of(python, "-c", backend, tmp_path, cwd=REPOSITORY)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_wanted() | {"pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith(("tests/", ".ci/", ".venv/", "demo-pmpd/"))]


def test_export_and_run_away_from_the_checkout(full_python: Path, tmp_path: Path) -> None:
    where = output_of(full_python, "-c", "import pmpd.exporter as e; print(e.__file__)", cwd=tmp_path)
    assert full_python.parents[1] in Path(where).parents, "this is the checkout's code, not the wheel's"
    commands = full_python.parent
    output_of(commands / "pmpd-export", "--model", "demo", "--output", "demo-pmpd", cwd=tmp_path)
    text = output_of(commands / "pmpd-run", "demo-pmpd", "-p", "Once upon a time", "-n", "5", "-q", cwd=tmp_path)
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time\n")
    data = REPOSITORY / "exporter" / "demo" / "openings.jsonl"
    output_of(
        *(commands / "pmpd-eval", "demo-pmpd", "--task", "fidelity", "--data", data, "--limit", "1"),
        *("--schedule", "uniform:4", "--max-new-tokens", "3", "--html", "report.html"),
        cwd=tmp_path,
    )
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    output_of(
        *(commands / "pmpd-npu", "demo-pmpd", "--hardware", "npu-4k", "--prompt", "8", "--tokens", "4"), cwd=tmp_path
    )


def test_tokens_come_out_of_a_bare_environment(bare_python: Path, demo_bundle: Path, tmp_path: Path) -> None:
    first, second, message = output_of(bare_python, "-I", "-c", GENERATE, demo_bundle, cwd=tmp_path).split(maxsplit=2)
    assert int(first) > 0
    assert int(second) > 0
    assert message == "tokenizers is not installed: run `pip install 'pmpd[text]'`\n"


def test_command_names_the_extra_it_needs(bare_python: Path) -> None:
    process = run(bare_python.with_name("pmpd-run"), "bundle")
    assert process.returncode == 1
    assert process.stderr == "error: click is not installed: run `pip install 'pmpd[text]'`\n"
