"""Which kernels run: the bundle's library for this machine, another, or none; and that a slow path is never silent."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pmpd.runtime import Bundle, BundleError, Generator, KernelError, PmpdError
from pmpd.runtime.cli import main
from pmpd.runtime.format.bundle import sha256_of
from pmpd.runtime.format.targets import machine_targets
from pmpd.tvm_kernels.library.link import link_library
from pmpd.tvm_kernels.targets import find_target, host_target

HOST = host_target() or ""
IDS = [1, 426, 440, 5, 77]
LAYERS, BLOCKS = 20, 5  # quantized layers of the demo model, its head aside, and its blocks
TOLERANCE = 0.02  # the portable attention rounds queries to float16, kernels do not
ATTENTION = "plain_attention_64"
pytestmark = pytest.mark.skipif(not HOST, reason="no operator library is made for this machine")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An operator library with plain kernels of 3, 4 and 6 bits."""
    output = tmp_path_factory.mktemp("library") / "libpmpd_ops.so"
    try:
        link_library(find_target(HOST), [Path(__file__).parents[1] / "kernels" / "plain_kernels.c"], output=output)
    except ImportError as error:
        pytest.skip(str(error))
    return output


def with_kernels(folder: Path, libraries: dict[str, Path], **changes: Any) -> Bundle:
    """Put libraries into a bundle by target, and change fields of its manifest."""
    document = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    for target, library in libraries.items():
        name = f"kernels/{target}/libpmpd_ops.so"
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(library, folder / name)
        document["kernels"][target] = name
        document["files"][name] = {"size": library.stat().st_size, "sha256": sha256_of(library)}
    (folder / "bundle.json").write_text(json.dumps(document | changes), encoding="utf-8")
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def fast(demo_bundle: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo bundle with the plain kernels for this machine, exact by default."""
    folder = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("fast") / "fast-pmpd")
    return with_kernels(folder, {HOST: library}, accuracy="exact")


@pytest.fixture
def slow(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture
def copy(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="pmpd"):
        yield lambda: [record.getMessage() for record in caplog.records]


def open_generator(bundle: Bundle, **options: Any) -> Generator:
    return Generator(bundle, threads=1, context_length=16, precisions=[4, 3], **options)


def test_kernels_give_the_logits_of_the_portable_graphs(fast: Bundle, warnings: Callable[[], list[str]]) -> None:
    compiled, portable = open_generator(fast), open_generator(fast, kernels=False)
    for precision in (4, 3):
        for generator in (compiled, portable):
            generator.reset()
        want = portable.decode(IDS, precision=precision)
        np.testing.assert_allclose(compiled.decode(IDS, precision=precision), want, atol=TOLERANCE)
        compiled.reset()
        steps = np.stack([compiled.decode_step(i, precision=precision) for i in IDS])
        np.testing.assert_allclose(steps, want, atol=TOLERANCE)
    assert warnings() == []


def test_every_node_is_reported(fast: Bundle) -> None:
    generator, other = open_generator(fast), open_generator(fast)
    assert {node.kernel for node in generator.kernels()} == {None}
    generator.prefill(IDS)
    generator.decode_step(7, precision=3)
    other.prefill(IDS)
    nodes = generator.kernels(reset=True)
    assert [node.kernel for node in nodes if node.op == "GroupQueryAttention" and node.calls] == [
        ATTENTION
    ] * 2 * BLOCKS
    nodes = [node for node in nodes if node.op == "BitplaneMatMul"]
    assert len(nodes) == 3 * (LAYERS + 1)
    prefill, decode_4, decode_3 = (
        [node for node in nodes if node.graph == graph] for graph in ("prefill.onnx", "decode-4.onnx", "decode-3.onnx")
    )
    assert [node.kernel for node in decode_3] == [*["plain_exact_3"] * LAYERS, "plain_exact_6"]
    assert [node.kernel for node in prefill] == [*["plain_exact_4"] * LAYERS, "plain_exact_6"]
    assert {(node.kernel, node.calls) for node in decode_4} == {(None, 0)}
    assert {node.calls for node in (*prefill, *decode_3)} == {1}
    assert all(node.seconds > 0 for node in (*prefill, *decode_3) if node.seconds is not None)
    head = decode_3[-1]
    assert (head.bits, head.n, head.k) == (6, 4096, 256)
    assert "head_proj" in head.node
    assert {(node.calls, node.seconds) for node in generator.kernels()} == {(0, 0.0)}
    assert {node.calls for node in other.kernels() if node.graph == "prefill.onnx"} == {1}


def test_portable_nodes_are_reported_too(slow: Bundle) -> None:
    nodes = open_generator(slow, kernels=False).kernels(reset=True)
    assert len(nodes) == 3 * (LAYERS + 1)
    assert {(node.kernel, node.calls, node.seconds) for node in nodes} == {("portable", None, None)}
    head = nodes[LAYERS]
    assert (head.graph, head.node, head.bits, head.n) == ("prefill.onnx", "head_proj", 6, 4096)
    assert {node.bits for node in nodes if node.graph == "decode-3.onnx"} == {3, 6}


def test_accuracy_is_the_bundles_or_what_is_asked_for(copy: Path, library: Path) -> None:
    bundle = with_kernels(copy, {HOST: library}, accuracy="int8")
    logits = {}
    for accuracy in ("exact", "int8", None):
        generator = open_generator(bundle, accuracy=accuracy)
        logits[accuracy] = generator.prefill(IDS)
    assert np.array_equal(logits[None], logits["int8"])
    assert not np.allclose(logits["exact"], logits["int8"], atol=TOLERANCE)
    assert [each.kernel for each in generator.kernels()][:2] == ["gather_rows", "plain_int8_4"]
    for options in ({}, {"kernels": False}):
        with pytest.raises(PmpdError, match="unknown accuracy 'int9': choose one of int8, exact"):
            open_generator(bundle, accuracy="int9", **options)


@pytest.mark.parametrize(
    ("system", "machine", "offered", "taken"),
    [
        ("Linux", "x86_64", ["x86-64-v3", "x86-64-v4", "aarch64-linux"], "x86-64-v4"),
        ("Linux", "x86_64", ["aarch64-linux", "x86-64-v3"], "x86-64-v3"),
        ("Linux", "aarch64", ["x86-64-v4", "aarch64-linux"], "aarch64-linux"),
        ("Linux", "x86_64", ["aarch64-linux"], None),
        ("Linux", "riscv64", ["x86-64-v4", "aarch64-linux"], None),
        ("Darwin", "arm64", ["aarch64-linux"], None),
        ("Windows", "AMD64", ["x86-64-v4"], None),
        ("Linux", "x86_64", [], None),
    ],
)
def test_the_best_library_for_the_machine_is_taken(
    system: str,
    machine: str,
    offered: list[str],
    taken: str | None,
    copy: Path,
    library: Path,
    warnings: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = with_kernels(copy, dict.fromkeys(offered, library))
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    chosen = open_generator(bundle).kernel_library
    if taken is not None:
        assert chosen is not None
        assert chosen.path == copy / "kernels" / taken / "libpmpd_ops.so"
        assert warnings() == []
        return
    assert chosen is None
    (warning,) = warnings()
    this = f"this machine ({system} {machine})"
    assert (f"has kernels for {', '.join(offered)}, not for {this}" if offered else "has no kernels: ") in warning
    assert warning.endswith("the portable graphs run instead, many times slower")
    with pytest.raises(KernelError, match=re.escape(this) if offered else "has no kernels"):
        open_generator(bundle, require_fast_kernels=True)


def test_a_library_that_does_not_load_is_said_and_gone_without(
    copy: Path, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    bundle = with_kernels(copy, {HOST: text})
    generator = open_generator(bundle)
    (warning,) = warnings()
    assert f"kernel library {copy / 'kernels' / HOST / 'libpmpd_ops.so'} does not load on this machine (" in warning
    assert generator.prefill(IDS).shape == (4096,)
    with pytest.raises(KernelError, match="does not load on this machine"):
        open_generator(bundle, require_fast_kernels=True)


def test_a_damaged_library_is_found_when_the_bundle_is_opened(copy: Path, library: Path) -> None:
    with_kernels(copy, {HOST: library})
    file = copy / "kernels" / HOST / "libpmpd_ops.so"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"libpmpd_ops\.so does not have the SHA-256"):
        Bundle.open(copy)
    file.unlink()
    with pytest.raises(BundleError, match=r"libpmpd_ops\.so is missing"):
        Bundle.open(copy)


def test_refused_kernels_are_not_even_loaded(
    fast: Bundle, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert open_generator(fast, kernels=False).kernel_library is None
    assert warnings() == []  # it is what was asked for
    with pytest.raises(KernelError, match="fast kernels are required and kernels refused"):
        open_generator(fast, kernels=False, require_fast_kernels=True)


def test_a_library_of_ones_own(slow: Bundle, library: Path, tmp_path: Path) -> None:
    for path in (library, str(library)):
        chosen = open_generator(slow, kernels=path, require_fast_kernels=True).kernel_library
        assert chosen is not None
        assert chosen.path == library
        assert chosen.info["target"] == HOST
    with pytest.raises(KernelError, match=r"kernel library .*/none\.so does not load on this machine"):
        open_generator(slow, kernels=tmp_path / "none.so")
    (extension,) = Path(np.__file__).parent.glob("*core/_multiarray_umath*.so")  # has other functions
    with pytest.raises(KernelError, match=r"does not load on this machine .*pmpd_ops_info"):
        open_generator(slow, kernels=extension)


def with_two_codebooks(copy: Path, library: Path) -> Bundle:
    """Claim two codebooks per row for one layer, at the end of a longer file."""
    document = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    codebook = next(tensor for tensor in document["tensors"] if tensor["role"] == "codebook")
    size = document["files"]["weights.bin"]["size"]
    codebook["shape"][1], codebook["length"], codebook["offset"] = 2, 2 * codebook["length"], -(-size // 64) * 64
    document["files"]["weights.bin"]["size"] = codebook["offset"] + codebook["length"]
    os.truncate(copy / "weights.bin", document["files"]["weights.bin"]["size"])
    (copy / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    return with_kernels(copy, {HOST: library})


def test_slow_kernels_are_refused_where_fast_ones_are_required(
    fast: Bundle, copy: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_generator(fast, require_fast_kernels=True)
    with pytest.raises(KernelError, match=r"decode-2\.onnx: .* only the slow kernel 'pmpd_any' for model\.layers\.0"):
        Generator(fast, require_fast_kernels=True)
    grouped = with_two_codebooks(copy, library)
    with pytest.raises(KernelError, match="no fast kernel has several codebooks per row"):
        open_generator(grouped, require_fast_kernels=True)


def test_slow_kernels_are_said_when_they_are_loaded(
    fast: Bundle, copy: Path, library: Path, warnings: Callable[[], list[str]]
) -> None:
    generator = Generator(fast, context_length=16)  # with 2 bits, which the library has only the generic kernel for
    (warning,) = warnings()
    assert "decode-2.onnx: " in warning
    assert "only the slow kernel 'pmpd_any'" in warning
    generator.prefill(IDS)
    generator.decode_step(7, precision=2)
    ran = {
        (node.graph, node.bits, node.slow) for node in generator.kernels() if node.op == "BitplaneMatMul" and node.calls
    }
    assert ran == {
        ("prefill.onnx", 4, False),
        ("prefill.onnx", 6, False),
        ("decode-2.onnx", 2, True),
        ("decode-2.onnx", 6, False),
    }


def test_several_codebooks_per_row_are_said_when_they_are_loaded(
    copy: Path, library: Path, warnings: Callable[[], list[str]]
) -> None:
    grouped = with_two_codebooks(copy, library)
    with contextlib.suppress(BundleError):  # its graphs are those of one codebook
        open_generator(grouped)
    (warning,) = warnings()
    assert warning.startswith("no fast kernel has several codebooks per row, and this bundle has 2: its products run")


def test_a_level_that_does_not_exist_is_an_error(fast: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMPD_MAX_ISA", "sse9")
    with pytest.raises(PmpdError, match="PMPD_MAX_ISA is 'sse9': choose one of") as caught:
        open_generator(fast)
    assert "\n" not in str(caught.value)


PROMPT = "Once upon a time, there was a little girl named Lily."


def run(bundle: Bundle, *arguments: str | Path) -> Result:
    command = [str(bundle.path), "-p", PROMPT, "-n", "3", "--schedule", "uniform:3", "--context-length", "32"]
    return CliRunner().invoke(main, [*command, *map(str, arguments)])


def test_show_kernels(fast: Bundle) -> None:
    result = run(fast, "--show-kernels")
    warning, _, *lines = result.stderr.splitlines()  # the second are statistics of the text
    assert "decode-2.onnx" in warning
    assert "only the slow kernel 'pmpd_any'" in warning
    assert {line.split(" µs")[0].rsplit(" ", 1)[0] for line in lines} == {
        "prefill.onnx: 1 BitplaneGather of 6 bits: gather_rows, 1 calls of",
        "prefill.onnx: 20 BitplaneMatMul of 4 bits: plain_exact_4, 20 calls of",
        "prefill.onnx: 1 BitplaneMatMul of 6 bits: plain_exact_6, 1 calls of",
        f"prefill.onnx: 5 GroupQueryAttention of 16 bits: {ATTENTION}, 5 calls of",
        "decode-3.onnx: 1 BitplaneGather of 6 bits: gather_rows, 2 calls of",
        "decode-3.onnx: 20 BitplaneMatMul of 3 bits: plain_exact_3, 40 calls of",
        "decode-3.onnx: 1 BitplaneMatMul of 6 bits: plain_exact_6, 2 calls of",
        f"decode-3.onnx: 5 GroupQueryAttention of 16 bits: {ATTENTION}, 10 calls of",
    }
    lines = run(fast, "--show-kernels", "--no-kernels").stderr.splitlines()[1:]
    assert lines[0] == "prefill.onnx: 20 BitplaneMatMul of 4 bits: portable"


def test_kernels_on_the_command_line(fast: Bundle, slow: Bundle, library: Path) -> None:
    text = run(fast, "--no-kernels", "-q").stdout
    assert run(fast, "-q").stdout == run(slow, "--kernels", library, "--accuracy", "exact", "-q").stdout == text
    assert ": plain_one_int8_3" in run(fast, "--accuracy", "int8", "--show-kernels").stderr
    for arguments, message in (
        (["--require-fast-kernels", "--no-kernels"], "fast kernels are required and kernels refused"),
        (["--require-fast-kernels"], "only the slow kernel 'pmpd_any'"),
        (["--accuracy", "int9"], "unknown accuracy 'int9'"),
        (["--kernels", "none.so"], "does not load on this machine"),
    ):
        result = run(fast, *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert run(fast, "--kernels", library, "--no-kernels").exit_code == 2


@pytest.mark.parametrize("quiet", [False, True])
def test_a_slow_path_is_one_line_on_stderr(quiet: bool, slow: Bundle) -> None:
    code = "from pmpd.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, str(slow.path), "-p", PROMPT, "-n", "2", *(["-q"] if quiet else [])]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    if quiet:
        assert process.stderr == ""
        return
    warning, statistics = process.stderr.splitlines()
    assert warning.startswith(f"warning: {slow.path} has no kernels: export it with --target {HOST}; ")
    assert statistics.startswith("prompt 14 tokens")


def test_the_targets_of_this_machine_are_known() -> None:
    assert machine_targets()[0] == HOST
