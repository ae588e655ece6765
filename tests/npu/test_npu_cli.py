"""`pmpd-npu` as a user types it: a real run of each kind, and every mistake one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.exporter.source.models import shipped_models
from pmpd.npu_backend import shipped_hardware
from pmpd.npu_backend.cli import main

POWERLESS = ("--prompt", "9", "--max-power-w", "0.01")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("npu") / "demo"
    export_skeleton(ExportConfig(model="demo", output=output, precisions=(4, 3, 2), context_length=128))
    return output


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pmpd-npu")


def tables(result: Result) -> list[list[list[str]]]:
    """The tables on stdout: rows of cells, header first."""
    found: list[list[list[str]]] = []
    after = ""
    for line in result.stdout.splitlines():
        if line.startswith("|"):
            if not after.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        after = line
    return [[table[0], *table[2:]] for table in found]


def test_a_generation_in_every_form(bundle: Path, tmp_path: Path) -> None:
    names = {"--json": "r.json", "--csv": "r.csv", "--plot": "r.svg", "--trace": "t.json", "--instructions": "i.txt"}
    files = [part for option, name in names.items() for part in (option, tmp_path / name)]
    result = run(
        bundle, "--hardware", "npu-16k", "--prompt", 64, "--tokens", 32, "--schedule", "fp16",
        "--schedule", "static:3@10,2@20", "--details", *files,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert sorted(result.stderr.splitlines()) == sorted(f"wrote {tmp_path / name}" for name in names.values())
    summary, *details = tables(result)
    assert [row[0] for row in summary[1:]] == ["fp16", "static:3@10,2@20"]
    speedup = summary[0].index("× fp16")
    assert summary[1][speedup] == "1.00"
    assert float(summary[2][speedup]) > 1.5
    assert len(details) == 6  # two prompts, decoding at float16, 4, 3 and 2 bits
    for table in details:
        share = [float(row[-1]) for row in table[1:]]
        assert share[-1] == 100
        assert sum(share[:-1]) == pytest.approx(100, abs=0.5)
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schedules"][1]["decode_speedup_over_fp16"] == pytest.approx(float(summary[2][speedup]), abs=0.01)
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + sum(len(table) - 2 for table in details)
    assert "GroupQueryAttention" in (tmp_path / "r.svg").read_text()
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) > 100
    listing = (tmp_path / "i.txt").read_text()
    assert [f"decode-{bits}.onnx" in listing for bits in (4, 3, 2)] == [True] * 3


def test_the_default_is_the_table_of_schedules(bundle: Path) -> None:
    result = run(bundle, "-q", "--prompt", 16, "--tokens", 8)
    assert result.stdout == run("simulate", bundle, "--prompt", 16, "--tokens", 8).stdout
    (summary,) = tables(result)
    assert [row[0] for row in summary[1:]] == ["fp16", "uniform:4", "uniform:3", "uniform:2"]
    speeds = [float(row[summary[0].index("decode tokens/s")].replace(",", "")) for row in summary[1:]]
    assert speeds == sorted(speeds)


def test_one_step_by_node(bundle: Path, tmp_path: Path) -> None:
    listing = tmp_path / "i.txt"
    result = run(
        bundle, "--prompt", 16, "--tokens", 8, "--step", 5, "--by", "node", "--schedule", "uniform:2",
        "--details", "--instructions", listing,
    )  # fmt: skip
    assert "Decode step 5, 2 bits, after 21 tokens" in result.stdout
    assert any(row[0].startswith("model/layers.3/self_attn/qkv_proj") for row in tables(result)[2])
    assert "1 new, 21 before" in listing.read_text()


def test_host_computes_the_output_layer(bundle: Path) -> None:
    arguments = (bundle, "--prompt", 16, "--tokens", 8, "--schedule", "uniform:2", "--by", "module", "--details")
    whole, layers = run(*arguments), run(*arguments, "--layers-only")
    assert "head_proj" in whole.stdout
    assert "head_proj" not in layers.stdout
    assert "the output layer on the host" in layers.stdout


def test_png_and_list_of_hardware(bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    assert run(bundle, "--prompt", 16, "--tokens", 8, "-q", "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = run("--list-hardware")
    assert [row[0] for row in tables(result)[0][1:]] == list(shipped_hardware())


def test_a_model_by_name() -> None:
    result = run("mobilellama-1.4b", "-q", "-v", "--prompt", 100, "--tokens", 4, "--schedule", "uniform:4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("mobilellama-1.4b on npu-4k: 100 tokens of prompt, 4 new ones\n")


def test_exploration(bundle: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text("[buffers]\nstream_kib = [64, 256]\n[memory]\nbandwidth_gb_s = [1]\n")
    files = {"--json": tmp_path / "x.json", "--csv": tmp_path / "x.csv", "--plot": tmp_path / "x.svg"}
    result = run(
        "explore", bundle, "--prompt", 32, "--tokens", 16, "--space", space, "--vary", "memory.bandwidth_gb_s=8:32:3",
        "--vary", "matrix_unit.rows=2,8,32", "--schedule", "uniform:3", "--max-area-mm2", 4, "--sample", 15,
        *(part for pair in files.items() for part in pair),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("designs 15/15, ")
    document = json.loads(files["--json"].read_text())
    assert document["designs"] + document["impossible_designs"] == 15
    (front,) = tables(result)
    assert front[0][:3] == ["buffers.stream_kib", "memory.bandwidth_gb_s", "matrix_unit.rows"]
    assert len(front) - 1 == min(20, len(document["front"]))
    assert {row[1] for row in front[1:]} <= {"8", "16", "32"}  # options beat the file
    assert all(row["area_mm2"] <= 4 for row in document["front"])
    assert len(files["--csv"].read_text().splitlines()) == 1 + document["designs_within_limits"]
    assert "<svg" in files["--plot"].read_text()
    again = run("explore", bundle, "--prompt", 32, "--tokens", 16, "--vary", "matrix_unit.rows=4", "-q")
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), f"unknown bundle 'nowhere': choose one of {', '.join(shipped_models())}, or give the folder"),
        (("{bundle}", "--hardware", "npu-4kk"), "unknown hardware 'npu-4kk': choose one of npu-4k, npu-16k"),
        (("{bundle}", "--hardware", "{file}"), "{file} is not valid TOML"),
        (("{bundle}", "--schedule", "uniform:5"), "schedule 'uniform:5': unknown precision '5': choose one of 4, 3"),
        (("{bundle}", "--schedule", "fp32"), "unknown schedule 'fp32'"),
        (("{bundle}", "--prompt", "100", "--tokens", "30"), "100 tokens of prompt and 30 new ones are more than"),
        (("{bundle}", "--prompt", "0", "--tokens", "9"), "a generation has 1 or more tokens of prompt"),
        (
            ("{bundle}", "--prompt", "9", "--tokens", "9", "--step", "8"),
            "there is no decode step 8: they are 0 to 7",
        ),
        (("{bundle}", "--plot", "x.pdf"), "x.pdf: a picture's name ends in .svg or .png"),
        (("{bundle}", "--json", "{folder}"), "{folder} is a folder: give the name of a file"),
        (("{bundle}", "--trace", "{folder}/none/t.json"), "cannot write {folder}/none/t.json: there is no folder"),
        (("{folder}",), "{folder} has no bundle.json"),
        (("explore", "{bundle}"), "nothing varies: give --vary FIELD=VALUES or --space FILE"),
        (("explore", "{bundle}", "--vary", "memory.speed=3"), "unknown number to vary 'memory.speed'"),
        (("explore", "{bundle}", "--space", "{folder}/none"), "cannot read {folder}/none (No such file"),
        (("explore", "{bundle}", "--vary", "matrix_unit.rows=4", "--sample", "0"), "a sample has 1 or more points"),
        (("explore", "{bundle}", "--vary", "matrix_unit.rows=4", "--schedule", "x"), "unknown schedule 'x'"),
        (
            ("explore", "{bundle}", "-q", "--vary", "matrix_unit.rows=4", "--tokens", "9", *POWERLESS),
            "none of 1 designs keeps the limits: at best they have",
        ),
        (("recipe", "figure5", "--plot", "x.gif"), "x.gif: a picture's name ends in .svg or .png"),
    ],
)
def test_mistakes_are_one_line(bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("title = ")
    places = {"bundle": bundle, "file": file, "folder": tmp_path}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message.format(**places)}")
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


def test_usage() -> None:
    assert run().exit_code == 2
    assert run().stderr == "error: missing argument 'BUNDLE' (see `pmpd-npu simulate --help`)\n"
    assert "no such command 'figure6'" in run("recipe", "figure6").stderr
    result = run("-h")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: pmpd-npu [COMMAND] ")
    assert "--hardware" in result.stdout  # the default command's options too
    assert {"simulate", "explore", "recipe"} <= {
        line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line
    }
    assert run("explore", "-h").stdout.startswith("Usage: pmpd-npu explore [OPTIONS] BUNDLE")


def test_a_file_that_cannot_be_written_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    target = tmp_path / "r.json"
    target.write_text("before")
    result = run(bundle, "-q", "--prompt", 9, "--tokens", 9, "--json", target)
    assert result.exit_code == 1
    assert result.stderr == f"error: cannot write {target} (No space left on device): choose another place\n"
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("package", "more", "line"),
    [
        ("click", [], "click is not installed: run `pip install 'pmpd[npu]'`"),
        ("onnx", [], "onnx is not installed: run `pip install 'pmpd[npu]'`"),
        ("matplotlib", ["--plot", "x.svg"], "matplotlib is not installed: run `pip install 'pmpd[npu]'`"),
    ],
)
def test_missing_packages(bundle: Path, tmp_path: Path, package: str, more: list[str], line: str) -> None:
    arguments = ["pmpd-npu", str(bundle), "--prompt", "9", "--tokens", "9", *more]
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = {arguments!r}; "
    process = subprocess.run(
        [sys.executable, "-c", code + "from pmpd.npu_backend.cli import main; main()"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr == f"error: {line}\n"


def test_a_bundle_needs_no_exporter(bundle: Path) -> None:
    """Graphs that are there are read without the packages that make them."""
    arguments = ["pmpd-npu", str(bundle), "--prompt", "9", "--tokens", "9", "-q"]
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in ("onnxscript", "onnx_ir", "torch", "matplotlib"))
    code = f"import sys; {hidden}sys.argv = {arguments!r}; from pmpd.npu_backend.cli import main; main()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    named = code.replace(str(bundle), "vicuna-7b")
    process = subprocess.run([sys.executable, "-c", named], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].endswith("is not installed: run `pip install 'pmpd[export]'`")
