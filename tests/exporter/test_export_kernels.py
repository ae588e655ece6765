"""Kernels in an export: built first, checked against the portable graphs, gone without where nothing builds them."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_models import TINY_MODELS

from pmpd.exporter import ExportConfig, export_bundle, pipeline
from pmpd.exporter.bundle import kernels
from pmpd.exporter.bundle.workspace import Workspace
from pmpd.exporter.cli import main
from pmpd.runtime import Bundle, Generator, Manifest, MissingExtraError, PmpdError
from pmpd.tvm_kernels.library import link
from pmpd.tvm_kernels.library.compile import Progress
from pmpd.tvm_kernels.library.link import link_library
from pmpd.tvm_kernels.targets import find_target, host_target

HOST = host_target() or ""
FOREIGN = "x86-64-v4" if HOST == "aarch64-linux" else "aarch64-linux"
LIBRARY = f"kernels/{HOST}/libpmpd_ops.so"
LAYERS = 4 * 2 + 2  # of the tiny model: what is quantized, the embedding too
pytestmark = pytest.mark.skipif(not HOST, reason="no operator library is made for this machine")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama"].save(tmp_path_factory.mktemp("model") / "tiny")


# What may be wrong with a kernel: the check that finds it, the line of plain_kernels.c, and what it becomes.
CODE = "code = code << 1 | (planes[plane * plane_bytes + (int64_t)row * lines * 64 + column / 8] >> column % 8 & 1);"
SUM = "y[i * ldy + row] += weight * x[(int64_t)i * lines * 512 + column];"
MUTATIONS = {
    "wrong sign": ("exact", SUM, SUM.replace("weight *", "(column == 5 ? -weight : weight) *")),
    "wrong lane": ("exact", CODE, CODE.replace(">> column % 8", ">> (column % 8 == 6 ? 7 : column % 8)")),
    "wrong lane of one row": (
        "exact",
        CODE,
        CODE.replace(">> column % 8", ">> (row % 16 == 3 && column % 8 == 6 ? 7 : column % 8)"),
    ),
    "stale table": ("exact", "    make_table(&table,", "    if (row == begin || row % 8) make_table(&table,"),
    "swapped planes": ("exact", CODE, CODE.replace("planes[plane", "planes[(plane < 2 ? 1 - plane : plane)")),
    "last columns forgotten": (
        "exact",
        "column < lines * 512; column++) {\n      uint32_t",
        "column < 44; column++) {\n      uint32_t",
    ),
    "weights 1 % too large": ("exact", "const float weight = table.step", "const float weight = 1.01f * table.step"),
    "wrong second row": ("exact", SUM, SUM.replace("+= weight", "+= (i == 1 ? 0.99f : 1) * weight")),
    "stale activations": ("exact", "memcpy(to, x + (int64_t)i * k,", "memcpy(to, x + (int64_t)(i ? i - 1 : 0) * k,"),
    "attention scale": (
        "exact",
        "from_half(keys[position * dim + i]) * scale",
        "from_half(keys[position * dim + i]) * 1.01f * scale",
    ),
    "attention one position short": ("exact", ": 0, place + 1);", ": 0, place ? place : 1);"),
    "attention one value late": (
        "exact",
        "weight * from_half(values[position * dim + i])",
        "weight * from_half(values[(position ? position - 1 : 0) * dim + i])",
    ),
    "rotation of the wrong position": (
        "exact",
        "rotate(key, cos + place * pairs, sin",
        "rotate(key, cos + past * pairs, sin",
    ),
    "key not stored": (
        "exact",
        "keys[at + i] = to_half(rotated[i]);",
        "if (i) keys[at + i] = to_half(rotated[i]);",
    ),
    "not a number": ("exact", "? table.offset * sum[i] : 0;", "? table.offset * sum[i] : row == 7 ? NAN : 0;"),
    "wrong correction": ("int8", "sum[i] += row[column];", "if (column != 9) sum[i] += row[column];"),
    "no correction": ("int8", "levels ? table.offset * sum[i] : 0", "0"),
    "wrong sign of int8": (
        "int8",
        SUM,
        SUM.replace("weight *", "(levels && column == 5 ? -weight : weight) *"),
    ),
    "stale table of int8": (
        "int8",
        "    make_table(&table,",
        "    if (row == begin || !levels || row % 8) make_table(&table,",
    ),
    "scale of another group": ("int8", "* (largest / 127);", "* ((group ? 1.02f : 1) * largest / 127);"),
    "one row of int8": ("int8", "0, 4, 1, 64, 0, pack_int8, matmul_int8", "0, 4, 1, 64, 0, pack_int8, matmul_exact"),
}


def plain_library(output: Path, *, wrong: str = "") -> Path:
    """Link the kernels of plain C, all right or with one of `MUTATIONS`."""
    text = (Path(__file__).parents[1] / "kernels" / "plain_kernels.c").read_text()
    if wrong:
        _, line, mutated = MUTATIONS[wrong]
        assert text.count(line) == 1, "plain_kernels.c has changed: adapt the mutation"
        text = text.replace(line, mutated)
    source = output.with_suffix(".c")
    source.write_text(text)
    try:
        link_library(find_target(HOST), [source], output=output)
    except MissingExtraError as error:
        pytest.skip(str(error))
    return output


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of plain C kernels without a fault."""
    return plain_library(tmp_path_factory.mktemp("library") / "right.so")


class Builder:
    """Stands in for the compiler: hands out a library, or fails as one that is not installed; counts what it does."""

    def __init__(self) -> None:
        self.library: Path | None = None
        self.built: list[tuple[str, tuple[int, ...]]] = []

    def __call__(
        self, target: str, *, precisions: Sequence[int], head_dims: Sequence[int], output: Path, progress: Progress
    ) -> None:
        if self.library is None:
            raise MissingExtraError("apache-tvm", "tune")
        self.built += [(name, tuple(precisions)) for name in progress([target], 1)]
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.library, output)


@pytest.fixture
def builder(right: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    builder.library = right
    monkeypatch.setattr(kernels, "build_library", builder)
    monkeypatch.setattr(pipeline, "require_toolchain", lambda _target: None)
    return builder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder where commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("pmpd"), "level", logging.WARNING)
    return tmp_path


def export(model: Path, *arguments: str) -> Result:
    command = ["-m", str(model), "-o", "out", "--precisions", "4", "--seed-precision", "4", *arguments]
    return CliRunner().invoke(main, command)


def small(model: Path, **options: Any) -> ExportConfig:
    return ExportConfig(model=str(model), output=Path("out"), precisions=(4,), head_precision=3, **options)


def opened() -> Manifest:
    return Bundle.open("out", verify=True).manifest


def test_the_bundle_holds_and_checks_the_kernels_of_this_machine(
    tiny: Path, builder: Builder, caplog: pytest.LogCaptureFixture
) -> None:
    result = export(tiny, "--target", f"{FOREIGN},{HOST},{HOST}", "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert builder.built == [(FOREIGN, (6, 4)), (HOST, (6, 4))]
    manifest = opened()
    assert manifest.kernels == {FOREIGN: f"kernels/{FOREIGN}/libpmpd_ops.so", HOST: LIBRARY}
    assert manifest.files.keys() >= set(manifest.kernels.values())
    assert manifest.accuracy == "int8"
    assert manifest.configuration["targets"] == [FOREIGN, HOST]
    verified = json.loads(result.stdout)["verification"]
    checks = {name: check for name, check in verified.items() if "kernels" in name}
    assert checks.keys() == {
        name
        for accuracy in ("exact", "int8")
        for name in (
            f"nodes of {accuracy} {HOST} kernels at 4 bits",
            f"{accuracy} {HOST} kernels at 4 bits against portable graphs",
        )
    }
    assert manifest.verified
    assert f"not checked, as this machine cannot run them: kernels for {FOREIGN}" in caplog.messages
    card = Path("out/README.md").read_text()
    assert f"| kernels | {FOREIGN}, {HOST} (int8) |" in card
    assert f"| {LIBRARY} |" in card
    generator = Generator(Bundle.open("out"), require_fast_kernels=True)
    generator.prefill([1, 2, 3])
    assert [node.kernel for node in generator.kernels()[:2]] == ["gather_rows", "plain_int8_4"]


# The plain kernels are for heads of 16.
@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "smollm3", "mistral-long-window", "mistral-window", "granite", "hunyuan"]
)
def test_every_family_passes_the_checks_with_kernels(name: str, builder: Builder, place: Path) -> None:
    model = TINY_MODELS[name]
    export_bundle(small(replace(model, options={**model.options, "head_dim": 16}).save(place / "model")))
    assert opened().verified
    generator = Generator(Bundle.open("out"), require_fast_kernels=True)
    whole = generator.decode([1, 2, 3, 4], precision=4)[3]
    generator.reset()
    generator.prefill([1, 2])
    generator.decode([3], precision=4)
    assert_close(generator.decode([4], precision=4)[0], whole)


def assert_close(logits: Any, wanted: Any) -> None:
    """A token alone gives the logits that it gives behind others, within what the kernels round."""
    np.testing.assert_allclose(logits, wanted, atol=0.05 * np.abs(wanted).max())


def test_by_default_kernels_are_those_of_this_machine(tiny: Path, builder: Builder) -> None:
    export_bundle(small(tiny, accuracy="exact"))
    assert builder.built == [(HOST, (4, 3))]
    assert (opened().kernels, opened().accuracy) == ({HOST: LIBRARY}, "exact")


def test_none_builds_none(tiny: Path, builder: Builder) -> None:
    assert export(tiny, "--target", "none").exit_code == 0
    assert (builder.built, opened().kernels) == ([], {})
    assert "| kernels | none: portable graphs, slow |" in Path("out/README.md").read_text()


def test_without_a_compiler_the_default_is_to_go_without(
    tiny: Path, builder: Builder, caplog: pytest.LogCaptureFixture
) -> None:
    builder.library = None
    with caplog.at_level(logging.WARNING, logger="pmpd"):
        export_bundle(small(tiny))
    (warning,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("kernels"))
    assert warning == (
        "kernels   skipped, the bundle will run slowly: apache-tvm is not installed: run `pip install 'pmpd[tune]'`, "
        "then export again with --overwrite"
    )
    assert opened().kernels == {}


@pytest.mark.parametrize(
    ("module", "package", "target"), [("tvm", "apache-tvm", HOST), ("ziglang", "ziglang", FOREIGN)]
)
def test_a_wanted_target_that_cannot_be_built_fails_before_anything_is_written(
    tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str, target: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == module else find_spec(name, *more)
    )
    result = export(tiny, "-q", "--target", target)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {package} is not installed: run `pip install 'pmpd[tune]'`\n"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x86-64-v5"], "unknown target 'x86-64-v5': choose one of x86-64-v"),
        (["--target", f"{HOST},"], "unknown target '': choose one of"),
        (["--target", f"none,{HOST}"], "unknown target 'none'"),
        (["--accuracy", "int4"], "unknown accuracy 'int4': choose one of int8, exact"),
    ],
)
def test_a_bad_value_is_one_line(arguments: list[str], message: str, tiny: Path, place: Path) -> None:
    result = export(tiny, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


def test_the_plan_lists_the_targets(tiny: Path, builder: Builder, place: Path) -> None:
    plan = export(tiny, "--dry-run", "--target", f"{HOST},{FOREIGN}", "--accuracy", "exact").stdout
    assert f"\nkernels   {HOST}, {FOREIGN}: exact, 6/4 bits\n" in plan
    assert f"\nkernels   {HOST}: int8, 6/4 bits\n" in export(tiny, "--dry-run").stdout
    assert "\nkernels   none\n" in export(tiny, "--dry-run", "--target", "none").stdout
    assert (builder.built, list(place.iterdir())) == ([], [])


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_wrong_kernels_fail_the_export(wrong: str, tiny: Path, builder: Builder, place: Path) -> None:
    builder.library = plain_library(place / "wrong.so", wrong=wrong)
    result = export(tiny, "-q", "--target", HOST)
    assert result.exit_code == 1
    accuracy = MUTATIONS[wrong][0]
    assert result.stderr.startswith(f"error: verification failed, nodes of {accuracy} {HOST} kernels at 4 bits: ")
    assert "nothing was published" in result.stderr
    assert "--no-verify" in result.stderr
    assert not Path("out").exists()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama-tied-bfloat16"].save(tmp_path_factory.mktemp("model") / "tied")


def test_a_tied_embedding_runs_in_the_library(tied: Path, builder: Builder) -> None:
    export_bundle(small(tied, targets=(HOST,)))
    assert not [tensor for tensor in opened().tensors if tensor.role == "embedding"]
    generator = Generator(Bundle.open("out"), require_fast_kernels=True)
    generator.prefill([1, 2, 3])
    first = generator.kernels()[0]
    assert (first.node.split("/")[1], first.op, first.kernel) == ("embed_tokens", "BitplaneGather", "gather_rows")
    assert (first.bits, first.n, first.k) == (3, opened().architecture.vocab_size, opened().architecture.hidden_size)


def test_an_embedding_of_its_own_runs_in_the_library(tiny: Path, builder: Builder) -> None:
    export_bundle(small(tiny, targets=(HOST,), embedding_precision=5))
    shape = opened().architecture
    tables = {tensor.name: tensor.shape for tensor in opened().tensors if tensor.role == "embedding"}
    assert tables == {
        "model.embed_tokens.planes": (5, shape.vocab_size, 64),
        "model.embed_tokens.codebook.5": (shape.vocab_size, 1, 2**5),
    }
    generator = Generator(Bundle.open("out"), require_fast_kernels=True)
    generator.prefill([1, 2, 3])
    first = generator.kernels()[0]
    assert (first.node.split("/")[1], first.op, first.kernel) == ("embed_tokens", "BitplaneGather", "gather_rows")
    assert (first.bits, first.n, first.k) == (5, shape.vocab_size, shape.hidden_size)


@pytest.mark.parametrize("which", ["tied", "tiny"])
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("word = word << 1 | spread(", "word = word << 1 | spread(byte == 1 ? 0 : "),
        ("value *= 0x1p112f;", "value *= 1.000001f * 0x1p112f;"),
    ],
    ids=["a byte", "the last bits"],
)
def test_a_wrong_row_of_the_embedding_fails_the_export(
    line: str,
    wrong: str,
    which: str,
    builder: Builder,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    shutil.copytree(link.SOURCES, place / "ort_ops")
    source = place / "ort_ops" / "gather.c"
    text = source.read_text()
    assert text.count(line) == 1, "gather.c has changed: adapt the mutation"
    source.write_text(text.replace(line, wrong))
    monkeypatch.setattr(link, "SOURCES", place / "ort_ops")
    builder.library = plain_library(place / "wrong.so")
    result = export(request.getfixturevalue(which), "-q", "--target", HOST)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: verification failed, nodes of exact {HOST} kernels at 4 bits: ")
    assert "model.embed_tokens" in result.stderr


def test_kernels_that_do_not_load_fail_the_export(tiny: Path, builder: Builder, place: Path) -> None:
    builder.library = place / "text.so"
    builder.library.write_text("no library")
    result = export(tiny, "-q")
    assert result.exit_code == 1
    assert "does not load on this machine" in result.stderr
    assert not Path("out").exists()


def test_an_interrupted_export_builds_nothing_twice_and_other_kernels_cost_no_other_work(
    tiny: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    written = []
    write = Workspace.write

    def count(workspace: Workspace, step: str, tensors: Any, **options: Any) -> None:
        written.append(step)
        write(workspace, step, tensors, **options)

    monkeypatch.setattr(Workspace, "write", count)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Verification", None)
        for _ in range(2):
            with pytest.raises(TypeError):
                export_bundle(small(tiny, targets=(HOST, FOREIGN)))
    assert [target for target, _ in builder.built] == [HOST, FOREIGN]
    (partial,) = place.glob("out.partial/*/bundle")
    (partial / "kernels" / HOST / ".libpmpd_ops.so.123").write_text("what a killed compiler left")
    export_bundle(small(tiny, targets=(HOST,), accuracy="exact"))
    assert [target for target, _ in builder.built] == [HOST, FOREIGN]
    assert len(written) == LAYERS + 1
    assert opened().kernels == {HOST: LIBRARY}
    files = {file.relative_to("out").as_posix() for file in Path("out").rglob("*") if file.is_file()}
    assert files == {*opened().files, "bundle.json"}


def test_a_library_that_got_lost_is_built_again(
    tiny: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Verification", None)
        with pytest.raises(TypeError):
            export_bundle(small(tiny))
    (partial,) = place.glob("out.partial/*/bundle")
    (partial / LIBRARY).unlink()
    export_bundle(small(tiny))
    assert len(builder.built) == 2
    Generator(Bundle.open("out"), require_fast_kernels=True)


def test_a_compiler_that_fails_fails_the_export(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PmpdError("`cc` cannot link it: no space")

    monkeypatch.setattr(kernels, "build_library", fail)
    with pytest.raises(PmpdError, match="cannot link"):
        export_bundle(small(tiny))
