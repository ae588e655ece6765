"""GGUF files that cannot be exported: one line that says why, in no time and little memory, and nothing written."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import convert, tokenizer_metadata, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TINY_MODELS

from pmpd.exporter import ExportConfig, export_bundle
from pmpd.exporter.source.gguf.architectures import _REFUSED, ARCHITECTURES
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.refused import REFUSED
from pmpd.runtime.errors import MissingExtraError, PmpdError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return convert(TINY_MODELS["llama"].save(folder / "folder"), folder / "tiny.gguf")


def refusal(model: Path, place: Path) -> str:
    """Export into the empty folder `place`; return the one line of the refusal, which leaves nothing there."""
    place.mkdir(parents=True)
    with pytest.raises(PmpdError) as caught:
        export_bundle(ExportConfig(model=str(model), output=place / "bundle", targets=()))
    assert "\n" not in str(caught.value)
    assert str(model.parent) in str(caught.value)
    assert list(place.iterdir()) == []
    return str(caught.value)


def header(version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 1 << 60
NUMBERS = text("k") + struct.pack("<II", 9, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"GG", "is not a GGUF file"),
        (b"PK\3\4 something else", "is not a GGUF file"),
        (b"GGUF", "is cut short or damaged"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
        (header(1), "has GGUF version 1"),
        (header(77), "has GGUF version 77"),
        (header(values=HUGE), "announces"),
        (header(tensors=HUGE), "announces"),
        (header(tensors=5), "announces"),
        (header(values=1, rest=struct.pack("<Q", HUGE)), "announces"),
        (header(values=1, rest=text("k") + struct.pack("<IQ", 8, HUGE)), "announces"),
        (header(values=1, rest=NUMBERS + struct.pack("<Q", HUGE)), "announces"),
        (header(values=1, rest=text("k") + struct.pack("<IIQ", 9, 8, HUGE)), "announces"),
        (header(values=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1)), "an array of the type 9"),
        (header(values=1, rest=text("k") + struct.pack("<I", 99)), "unknown type 99"),
        (header(values=2, rest=2 * (text("k") + struct.pack("<II", 4, 1))), "two values of k"),
        (header(tensors=1, rest=text("t") + struct.pack("<I", 9) + bytes(99)), "9 dimensions"),
        (header(values=1, rest=text("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
    ],
)
def test_what_is_no_header_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    assert message in refusal(file, tmp_path / "place")


def test_huge_counts_take_no_memory(tmp_path: Path) -> None:
    """A large file cannot make an array of its size either."""
    resource = pytest.importorskip("resource")
    file = tmp_path / "model.gguf"
    with file.open("wb") as stream:
        stream.write(header(values=1, rest=text("k") + struct.pack("<IIQ", 9, 0, 1 << 31)))
        stream.truncate(1 << 32)  # it has holes: nothing is written
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "announces" in refusal(file, tmp_path / "place")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_ends_too_early_is_refused(share: float, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    data = whole.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert "is cut short" in refusal(file, tmp_path / "place")


def model_file(path: Path, changes: dict[str, Any], tensors: dict[str, Any] | None = None, **options: Any) -> Path:
    name = options.get("architecture", "llama")
    numbers: dict[str, Any] = {
        f"{name}.block_count": 1,
        f"{name}.context_length": 64,
        f"{name}.embedding_length": 256,
        f"{name}.feed_forward_length": 256,
        f"{name}.attention.head_count": 8,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata = {key: value for key, value in (numbers | changes).items() if value is not None}
    return write_gguf(
        path, metadata, {"token_embd.weight": np.zeros((4, 256), np.float32)} | (tensors or {}), **options
    )


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "Q8_K"])
def test_a_type_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.zeros((4, 256 // block * size), np.uint8)
    message = refusal(model_file(tmp_path / "m.gguf", {}, {"output.weight": (data, number)}), tmp_path / "place")
    assert f"tensor output.weight of {tmp_path / 'm.gguf'} has the type {kind}, which cannot be read" in message


def test_a_type_of_the_future_is_named_by_its_number(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 999)
    (tmp_path / "m.gguf").write_bytes(data)
    assert "has the type number 999" in refusal(tmp_path / "m.gguf", tmp_path / "place")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, "the metadata lacks llama.block_count"),
        ({"llama.embedding_length": "wide"}, "makes no sense"),
        ({"llama.attention.head_count": 0}, "makes no sense"),
        ({"llama.expert_count": 8}, "it has 8 experts"),
        ({"llama.feed_forward_length": [256, 512]}, "differs from layer to layer"),
        ({"llama.attention.key_length": 32, "llama.attention.value_length": 64}, "heads of different sizes"),
        ({"llama.rope.scaling.type": "spiral"}, "unknown rope scaling 'spiral'"),
        ({"llama.block_count": 2}, "has no tensor 'blk.0."),
    ],
)
def test_metadata_that_makes_no_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(model_file(tmp_path / "m.gguf", changes), tmp_path / "place")


def test_a_tensor_that_has_no_place_is_named(tmp_path: Path) -> None:
    file = model_file(tmp_path / "m.gguf", {}, {"blk.0.attn_sinks.weight": np.zeros(8, np.float32)})
    message = "tensor blk.0.attn_sinks.weight has no place in the model: give the original checkpoint"
    assert message in refusal(file, tmp_path / "place")


def test_a_stack_of_other_heads_is_refused(tmp_path: Path) -> None:
    folder = TINY_MODELS["phi"].save(tmp_path / "folder")
    file = convert(folder, tmp_path / "m.gguf", stacked=True)
    data = file.read_bytes()
    key = b"phi2.attention.head_count_kv" + struct.pack("<I", 4)
    file.write_bytes(data.replace(key + struct.pack("<I", 3), key + struct.pack("<I", 1)))
    assert "tensor blk.0.attn_qkv.weight has 144 rows instead of the 80 of queries" in refusal(file, tmp_path / "place")


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    file = model_file(tmp_path / "m.gguf", {}, architecture="lama")
    assert "general.architecture: unknown architecture 'lama': choose one of llama" in refusal(file, tmp_path / "place")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("lfm2", "its short convolutions have a state"),
        ("lfm2moe", "its short convolutions have a state"),
        ("qwen35", "its linear attention (Gated DeltaNet)"),
        ("qwen35moe", "its linear attention (Gated DeltaNet)"),
        ("qwen3next", "its linear attention (Gated DeltaNet)"),
        ("gemma3n", "its per-layer embeddings"),
        ("gemma4", "its heads differ in size"),
        ("granitehybrid", "it has Mamba layers"),
        ("mamba", "it has Mamba layers"),
        ("mamba2", "it has Mamba layers"),
        ("falcon-h1", "it has Mamba layers"),
        ("qwen3moe", "it is a mixture of experts"),
        ("gpt-oss", "it is a mixture of experts"),
        ("deepseek2", "its latent attention (MLA)"),
        ("rwkv7", "it is recurrent"),
        ("exaone4", "no family here has both norms behind"),
        ("modern-bert", "it is an encoder"),
    ],
)
def test_an_architecture_that_cannot_be_exported_is_refused_with_the_reason(
    architecture: str, reason: str, tmp_path: Path
) -> None:
    file = model_file(tmp_path / "m.gguf", {}, architecture=architecture)
    message = f"general.architecture: the architecture '{architecture}' cannot be exported: {reason}"
    assert message in refusal(file, tmp_path / "place")


def test_refused_architectures_are_those_of_the_package() -> None:
    assert _REFUSED.keys() <= set(gguf.MODEL_ARCH_NAMES.values())
    assert set(_REFUSED.values()) <= REFUSED.keys()
    assert not ARCHITECTURES.keys() & (_REFUSED.keys() | REFUSED.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "unknown tokenizer 'bert'"),
        ({"pre": "esperanto"}, "unknown splitting rule 'esperanto'"),
        ({"pre": None}, "unknown splitting rule"),
        ({"token_type": [1]}, "3 tokens have 1 types"),
        ({"bos_token_id": 9}, "bos_token_id is 9 of 3 tokens"),
        ({"merges": ["a z"]}, "its tokenizer is damaged"),
        ({"merges": ["ab"]}, "its tokenizer is damaged"),
        ({"model": "llama"}, "3 tokens have 0 scores"),
    ],
)
def test_a_tokenizer_that_is_not_known_or_damaged_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"], "token_type": [1, 1, 1]} | changes
    metadata = tokenizer_metadata(["a", "b", "ab"], fields.pop("token_type"), **fields)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(str(model_file(tmp_path / "m.gguf", metadata)))
    with pytest.raises(PmpdError, match=message) as caught:
        checkpoint.tokenizer()
    assert "\n" not in str(caught.value)
    assert str(checkpoint.path) in str(caught.value)


def test_a_file_without_tokenizer_gives_a_checkpoint_without_one(whole: Path) -> None:
    checkpoint = open_checkpoint(str(whole))
    assert checkpoint.tokenizer() is None
    assert checkpoint.generation_config() == {}


def split(folder: Path) -> list[Path]:
    """Write a model in parts; return them."""
    source = TINY_MODELS["llama"].save(folder / "folder")
    convert(source, folder / "tiny.gguf", split_max_tensors=8)
    return sorted(folder.glob("tiny-*.gguf"))


def test_the_parts_of_a_split_model_are_one_model(whole: Path, tmp_path: Path) -> None:
    parts = split(tmp_path)
    assert len(parts) > 1
    ours, one = open_checkpoint(str(parts[0])), open_checkpoint(str(whole))
    name = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(ours.tensor(name).numpy(), one.tensor(name).numpy())
    assert ours.config == one.config
    assert ours.nbytes == sum(part.stat().st_size for part in parts)


@pytest.mark.parametrize(
    ("damage", "given", "message"),
    [
        (lambda parts: parts[1].unlink(), 0, "is missing"),
        (lambda parts: None, 1, "is not the first of"),
        (lambda parts: parts[1].write_bytes(parts[2].read_bytes()), 0, "is not part 2"),
        (lambda parts: parts[0].rename(parts[0].with_name("x.gguf")), None, "rename it"),
    ],
    ids=["a part is missing", "not the first", "another part", "renamed"],
)
def test_a_split_model_that_is_not_whole_is_refused(
    damage: Callable[[list[Path]], Any], given: int | None, message: str, tmp_path: Path
) -> None:
    parts = split(tmp_path)
    damage(parts)
    file = tmp_path / "x.gguf" if given is None else parts[given]
    assert message in refusal(file, tmp_path / "place")


def test_a_folder_of_gguf_files_says_to_give_the_file(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tiny.gguf").write_bytes(whole.read_bytes())
    assert "give the GGUF file in it" in refusal(tmp_path / "folder", tmp_path / "place")


def test_without_the_package_the_extra_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"gguf is not installed: run `pip install 'pmpd\[export\]'`"):
        open_checkpoint(str(whole))


@pytest.mark.full
def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(header(tensors=HUGE))
    command = [sys.executable, "-m", "pmpd.exporter.cli", "--model", str(file), "--output", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: {file} is damaged (byte 24 announces 1152921504606846976 tensors")
    assert not (tmp_path / "out").exists()


@given(changes=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_read_or_refused_in_one_line(
    changes: list[tuple[int, bytes]], whole: Path, tmp_path: Path
) -> None:
    data = bytearray(whole.read_bytes())
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    message = message_of(file)
    assert "\n" not in message


def message_of(file: Path) -> str:
    """Read what an export reads of a file; return why it is refused, or nothing."""
    try:
        checkpoint = open_checkpoint(str(file))
        checkpoint.require("model.embed_tokens.weight", (131, 48))
        checkpoint.tensor("model.embed_tokens.weight")
        checkpoint.tokenizer()
    except PmpdError as error:
        return str(error)
    return ""
