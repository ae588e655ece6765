"""What a user reads who lacks a package, or has one too many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pmpd.runtime import Bundle, MissingExtraError, PmpdError, Tokenizer

HIDE = "import sys; sys.modules[{name!r}] = None; "
BOTH = """
import importlib.metadata as metadata
real = metadata.distribution
metadata.distribution = lambda name: real("onnxruntime") if name == "onnxruntime-gpu" else real(name)
"""
RUN = "import sys; sys.argv = ['pmpd-run', {bundle!r}, '-p', 'x', '-n', '1']; from pmpd.runtime.cli import main; main()"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "cpu"), ("tokenizers", "text"), ("click", "text")])
def test_command_says_what_to_install(demo_bundle: Path, package: str, extra: str) -> None:
    process = run(HIDE.format(name=package) + RUN.format(bundle=str(demo_bundle)))
    assert process.returncode == 1
    assert process.stderr == f"error: {package} is not installed: run `pip install 'pmpd[{extra}]'`\n"


def test_library_says_what_to_install(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(demo_bundle)
    tokenizer = Tokenizer(Tokenizer.from_bundle(bundle)._tokenizer, "{{ messages }}", {})
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "pmpd.runtime.chat", raising=False)  # another test may have imported it already
    with pytest.raises(MissingExtraError, match=r"jinja2 is not installed: run `pip install 'pmpd\[text\]'`"):
        tokenizer.apply_chat_template([])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"tokenizers is not installed") as caught:
        Tokenizer.from_bundle(bundle)
    assert isinstance(caught.value, PmpdError)
    assert isinstance(caught.value, ImportError)


def test_runtime_without_onnxruntime_can_be_imported_but_not_generate(demo_bundle: Path) -> None:
    code = "from pmpd.runtime import Bundle, Generator; bundle = Bundle.open({bundle!r}); print('opened'); "
    process = run(HIDE.format(name="onnxruntime") + (code + "Generator(bundle)").format(bundle=str(demo_bundle)))
    assert process.stdout == "opened\n"
    assert "MissingExtraError: onnxruntime is not installed: run `pip install 'pmpd[cpu]'`" in process.stderr


def test_both_onnxruntimes_at_once(demo_bundle: Path) -> None:
    process = run(BOTH + RUN.format(bundle=str(demo_bundle)))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: onnxruntime and onnxruntime-gpu are both installed")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in line
