"""`pmpd-export` as a user types it: what it prints where, its exit codes, and that a mistake leaves nothing behind."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import TINY_MODELS, save_with_tokenizer

from pmpd.exporter.cli import main
from pmpd.exporter.demo import demo_model_path
from pmpd.runtime import Bundle

CHECKS = {
    "float32 graph against transformers",
    "decode at 2 bits against dequantized weights",
    "decode at 1 bits against dequantized weights",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama"].save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty folder where commands run; settings of this process that a command changes are put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    level = logging.getLogger("pmpd").level
    for name in "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS":
        monkeypatch.setenv(name, "error")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.getLogger("pmpd").setLevel(level)


def export(*arguments: str | Path) -> Result:
    """Run the command in this process, which spares the seconds that imports take; kernels are another file's."""
    return CliRunner().invoke(main, [*map(str, arguments), "--target", "none"])


def export_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-c", "from pmpd.exporter.cli import main; main()", *map(str, arguments)]
    command += ["--target", "none"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_needs_no_heavy_packages() -> None:
    code = "import sys; sys.modules['torch'] = None; from pmpd.exporter.cli import main; main()"
    process = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    for option in "--model", "--output", "--precisions", "--calibration", "--dry-run", "--json", "--overwrite":
        assert option in process.stdout
    assert process.stderr == ""


@pytest.mark.full
@pytest.mark.parametrize(
    ("package", "extra"), [("click", "export"), ("torch", "cpu,export"), ("onnxruntime", "cpu,export")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(package: str, extra: str, place: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from pmpd.exporter.cli import main; main()"
    process = subprocess.run([sys.executable, "-c", code, "-m", "demo"], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == f"error: {package} is not installed: run `pip install 'pmpd[{extra}]'`\n"
    assert list(place.iterdir()) == []


def test_the_result_is_on_stdout_and_the_rest_on_stderr(tiny: Path) -> None:
    process = export_process("-m", tiny, "-o", "out", "--precisions", "2,1", "--json", "-")
    assert process.returncode == 0
    result = json.loads(process.stdout)
    assert result["bundle"] == "out"
    assert result["verification"].keys() > CHECKS
    for said in (
        "llama, 0.1 M parameters, 2 layers, context 64",
        "2/1 bits from 2 planes",
        "12 a layer",
        "has no tokenizer",
        "quantize 10/10",
    ):
        assert said in process.stderr
    (verified,) = (line for line in process.stderr.splitlines() if line.startswith("verified"))
    assert re.fullmatch(
        rf"verified  {len(result['verification'])} checks passed: worst node at [\d.e-]+ of its rounding bound",
        verified,
    )
    assert Bundle.open("out", verify=True).manifest.verification == result["verification"]


@pytest.mark.full
def test_verbose_prints_every_check(tiny: Path) -> None:
    process = export_process("-v", "-m", tiny, "-o", "out", "--precisions", "2,1", "--target", "none")
    for name, check in Bundle.open("out").manifest.verification.items():
        assert f"verified  {name}: {check['summary']}\n" in process.stderr


@pytest.mark.full
def test_quiet_prints_the_result_alone(place: Path) -> None:
    model = save_with_tokenizer(place / "model")
    (place / "text.txt").write_text("The owl saw a tree. " * 20)
    calibration = ("--calibration", "text.txt", "--calibration-samples", "1", "--calibration-length", "16")
    process = export_process("-q", "-m", model, "-o", "out", "--precisions", "1", "--seed-precision", "1", *calibration)
    assert (process.returncode, process.stdout, process.stderr) == (0, "out\n", "")


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny: Path, place: Path) -> None:
    result = export("-m", tiny, "--dry-run", "--precisions", "4,2", "--prefill", "2")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"model     {tiny}: llama")
    assert "bundle    tiny-pmpd: 4/2 bits from 4 planes, prefill at 2, head at 6, embedding at 6, " in result.stdout
    assert "method    anyprecision, without a text\n" in result.stdout
    assert " kB of disk, about " in result.stdout
    assert list(place.iterdir()) == []


def test_the_precision_of_an_embedding(tiny: Path, place: Path) -> None:
    text = export("-m", tiny, "--dry-run", "--embedding-precision", "4").stdout
    assert "head at 6, embedding at 4, schedule" in text
    assert f", embedding {131 * (4 * 64 + 2 * 2**4) / 1e6:.1f}, others " in text
    tied = TINY_MODELS["llama-tied-bfloat16"].save(place / "tied")
    text = export("-m", tied, "--dry-run").stdout
    assert "head at 6, schedule" in text
    assert "(the embedding is tied: read from the head)" in text
    result = export("-m", tied, "--embedding-precision", "8")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "embedding precision 8: this model's embedding is tied to its output layer" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--precisions 2,3,4", "precisions must fall without repeats (4,3,2), got 2,3,4"),
        ("--precisions 4,4", "precisions must fall without repeats (4,3,2), got 4,4"),
        ("--precisions 9,4", "precision must be 1 to 8 bits, got 9"),
        ("--precisions 4,0", "precision must be 1 to 8 bits, got 0"),
        ("--parent 9", "parent precision must be 1 to 8 bits, got 9"),
        ("--parent 3", "parent precision 3 is lower than the highest precision 5"),
        ("--parent 0", "parent precision"),
        ("--seed-precision 0", "seed precision must be 1 to 8 bits, got 0"),
        ("--head-precision 16", "head precision must be 1 to 8 bits, got 16"),
        ("--head-precision 0", "head precision must be 1 to 8 bits, got 0"),
        ("--embedding-precision 9", "embedding precision must be 1 to 8 bits, got 9"),
        ("--prefill 2", "prefill precision 2 is not among the precisions [5, 4, 3]"),
        ("--groups 0", "groups must be 1 or more, got 0"),
        ("--schedule static:2@4,3@8", "precisions must fall, never rise or repeat"),
        ("--schedule static:3@16,2@8", "a lower precision cannot start before a higher one"),
        ("--schedule uniform:2", "unknown precision '2': choose one of 5, 4, 3"),
        ("--schedule sometimes", "unknown schedule 'sometimes': choose one of"),
        ("--context-length 65", "context length 65: the model allows 1 to 64"),
        ("--context-length 0", "context length 0: the model allows 1 to 64"),
        ("--calibration no-such.txt", "calibration text no-such.txt is not a file"),
        ("--calibration .", "calibration text . is not a file"),
        ("--calibration-samples 0", "calibration samples must be 1 or more, got 0"),
        ("--calibration-length 0", "calibration length must be 1 or more, got 0"),
    ],
)
def test_a_bad_value_is_one_line(arguments: str, message: str, tiny: Path, place: Path) -> None:
    result = export("-m", tiny, "-o", "out", *arguments.split())
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m demo --precisions four", "'four' is not a list of bits like 4,3,2"),
        ("-m demo --precisions ''", "is not a list of bits"),
        ("-m demo --groups many", "'many' is not a valid integer"),
        ("-m demo --grups 3", "no such option"),
        ("-m demo unexpected", "unexpected extra argument"),
        ("-o out", "missing option '-m' / '--model'"),
    ],
)
def test_a_usage_error_exits_2(arguments: str, message: str, place: Path) -> None:
    result = export(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert message in line
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("phi15", "unknown model 'phi15': choose one of phi-1.5"),
        ("./nowhere", "there is no file or folder nowhere: give the folder of a Hugging Face checkpoint, a GGUF"),
        (".", "has no config.json: give a Hugging Face checkpoint's folder"),
        ("model.gguf", "model.gguf is not a GGUF file (it does not begin with GGUF): give another --model"),
        ("notes.txt", "notes.txt is a file: give a GGUF file, or the folder of a Hugging Face checkpoint"),
        ("../models/no/such", "there is no file or folder ../models/no/such: give the folder"),
    ],
)
def test_a_wrong_model_is_one_line(model: str, message: str, place: Path) -> None:
    before = [place / model] if model.endswith((".gguf", ".txt")) else []
    for file in before:
        file.write_text("")
    result = export("-m", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(place.iterdir()) == before


def test_the_output_is_named_after_the_model(tiny: Path) -> None:
    assert "bundle    demo-pmpd:" in export("-m", "demo", "--dry-run").stdout
    assert "bundle    tiny-pmpd:" in export("-m", f"{tiny}/", "--dry-run").stdout
    assert "bundle    model-pmpd:" in export("-m", demo_model_path(), "--dry-run").stdout


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("text.txt", b"Too short.", "fewer than one sequence of 256: give more text"),
        ("text.txt", b"\xff\xfe\x00", "cannot read text from 'text.txt'"),
        (
            "text.jsonl",
            b'{"text": "fine"}\n{"title": "none"}',
            'text.jsonl:2 is not a JSON object with a "text" string',
        ),
        ("text.jsonl.gz", b"plain", "cannot read text from 'text.jsonl.gz'"),
        ("text.pdf", b"%PDF", "'text.pdf' has an unknown file type"),
    ],
)
def test_a_calibration_text_that_does_not_serve_is_one_line(name: str, text: bytes, message: str, place: Path) -> None:
    (place / name).write_bytes(text)
    result = export("-q", "-m", "demo", "-o", "out", "--calibration", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (place / "out").exists()


def test_calibration_needs_a_tokenizer(tiny: Path, place: Path) -> None:
    (place / "text.txt").write_text("Some text.")
    result = export("-q", "-m", tiny, "-o", "out", "--calibration", "text.txt")
    assert result.exit_code == 1
    assert "has no tokenizer for a calibration text: take --calibration own" in result.stderr
    assert result.stderr.count("\n") == 1
