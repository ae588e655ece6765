"""Opening a bundle: whatever is wrong with it gives one clear error, never a crash."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmpd.runtime import Bundle, BundleError, Generator, PmpdError
from pmpd.runtime.format.bundle import sha256_of

Edit = Callable[[Path], object]


@pytest.fixture
def bundle_copy(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


def one_error(path: Path, *, verify: bool = False) -> str:
    """Return the message of the BundleError that opening gives."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_manifest(path: Path, edit: Callable[[Any], object]) -> None:
    document = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    edit(document)
    (path / "bundle.json").write_text(json.dumps(document), encoding="utf-8")


def flip_bit(file: Path, *, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 0x10
    file.write_bytes(data)


def truncate(file: Path, *, by: int = 1) -> None:
    os.truncate(file, file.stat().st_size - by)


def list_file(path: Path, name: str, target: Path) -> None:
    """Enter `target` into the manifest under `name`, with its true size and hash."""
    entry = {"size": target.stat().st_size, "sha256": sha256_of(target)}
    edit_manifest(path, lambda document: document["files"].update({name: entry}))


def test_whole_bundle_opens(demo_bundle: Path) -> None:
    bundle = Bundle.open(str(demo_bundle), verify=True)
    assert bundle.manifest.precisions == (4, 3, 2)
    assert set(bundle.manifest.files) == {file.name for file in demo_bundle.iterdir()} - {"bundle.json"}
    assert bundle.stop_ids == (2,)


def test_tensors_are_read_only_views_of_one_mapping(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    nested = next(tensor for tensor in bundle.manifest.tensors if tensor.nested)
    whole, prefix = bundle.tensor(nested), bundle.tensor(nested, planes=2)
    raw = (demo_bundle / nested.file).read_bytes()
    assert whole.tobytes() == raw[nested.offset : nested.offset + nested.length]
    assert prefix.shape == (2, *nested.shape[1:])
    assert np.shares_memory(whole, prefix)
    assert not whole.flags.writeable
    plain = next(tensor for tensor in bundle.manifest.tensors if not tensor.nested)
    assert bundle.tensor(plain, planes=2).shape == plain.shape  # only nested ones have a prefix


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "bundle.json").unlink(), "has no bundle.json: give a bundle's folder"),
        (lambda p: (p / "bundle.json").write_bytes(b""), "not valid JSON"),
        (lambda p: truncate(p / "bundle.json", by=1000), "not valid JSON"),
        (lambda p: (p / "bundle.json").write_bytes(b"\xff\xfe\x00garbage"), "is not UTF-8 text"),
        (lambda p: (p / "bundle.json").write_bytes(bytes(range(32, 127)) * 9), "not valid JSON"),
        (
            lambda p: edit_manifest(p, lambda d: d.update(version=5)),
            "has version 5, this runtime reads versions 1 to 4",
        ),
        (lambda p: edit_manifest(p, lambda d: d.update(format="gguf")), "this is not a PMPD bundle"),
        (lambda p: edit_manifest(p, lambda d: d.pop("graphs")), "has no field 'graphs'"),
        (lambda p: edit_manifest(p, lambda d: d.update(precisions="4,3,2")), "precisions must be list"),
        (lambda p: edit_manifest(p, lambda d: d.update(more=1)), "unknown field 'more'"),
        (lambda p: edit_manifest(p, lambda d: d["tensors"][0].update(offset=10**9)), "ends at byte"),
        (lambda p: (p / "decode-3.onnx").unlink(), "decode-3.onnx is missing"),
        (lambda p: truncate(p / "weights.bin"), "bytes instead of"),
        (lambda p: truncate(p / "prefill.onnx"), "bytes instead of"),
        (lambda p: (p / "weights.bin").open("ab").write(b"x"), "bytes instead of"),
        (lambda p: flip_bit(p / "decode-2.onnx"), "decode-2.onnx does not have the SHA-256"),
        (lambda p: flip_bit(p / "tokenizer.json"), "tokenizer.json does not have the SHA-256"),
    ],
)
def test_damage_gives_one_clear_error(bundle_copy: Path, damage: Edit, message: str) -> None:
    damage(bundle_copy)
    assert message in one_error(bundle_copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "generation_config.json is not valid JSON"),
        (b"{", "generation_config.json is not valid JSON"),
        (b"[" * 100_000, "generation_config.json is not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice in one object"),
        (b'{"eos_token_id": "\xff"}', "generation_config.json is not UTF-8 text"),
        (b"[2]", "generation_config.json must be an object, got [2]"),
        (b"17", "generation_config.json must be an object, got 17"),
        *(
            (json.dumps({"eos_token_id": ids}).encode(), f"must be a token id or a list of them, got {ids!r}")
            for ids in ("</s>", True, 2.0, -1, [2, "x"], [[2]], [True], {"2": 2})
        ),
    ],
)
def test_a_generation_config_that_is_not_one(bundle_copy: Path, text: bytes, message: str) -> None:
    (bundle_copy / "generation_config.json").write_bytes(text)
    list_file(bundle_copy, "generation_config.json", bundle_copy / "generation_config.json")
    assert message in one_error(bundle_copy)


@pytest.mark.parametrize(
    ("text", "ids"), [("{}", ()), ('{"eos_token_id": null}', ()), ('{"eos_token_id": [2, 0, 7]}', (2, 0, 7))]
)
def test_a_text_may_end_at_none_one_or_several_tokens(bundle_copy: Path, text: str, ids: tuple[int, ...]) -> None:
    (bundle_copy / "generation_config.json").write_text(text)
    list_file(bundle_copy, "generation_config.json", bundle_copy / "generation_config.json")
    assert Bundle.open(bundle_copy).stop_ids == ids


def test_files_of_a_terabyte_are_refused_at_once(bundle_copy: Path) -> None:
    os.truncate(bundle_copy / "tokenizer.json", 2**40)  # a hole: it takes no disk
    edit_manifest(bundle_copy, lambda d: d["files"]["tokenizer.json"].update(size=2**40))
    assert "bytes besides the weights: do not use this bundle" in one_error(bundle_copy)
    edit_manifest(bundle_copy, lambda d: d["files"]["prefill.onnx"].update(size=2**40))
    os.truncate(bundle_copy / "bundle.json", 2**40)
    assert "bundle.json is larger than 67,108,864 bytes" in one_error(bundle_copy)


def test_bit_flip_in_the_weights_is_found_when_asked(bundle_copy: Path) -> None:
    flip_bit(bundle_copy / "weights.bin")
    Bundle.open(bundle_copy)
    assert "weights.bin does not have the SHA-256" in one_error(bundle_copy, verify=True)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "x.partial").mkdir()
    assert "has no bundle.json: give a bundle's folder" in one_error(tmp_path)
    assert "has no bundle.json" in one_error(tmp_path / "absent")
    assert "has no bundle.json" in one_error(tmp_path / "file")
    assert "an export is unfinished here, run it again" in one_error(tmp_path / "x.partial")


@pytest.mark.parametrize("name", ["../outside.txt", "sub/../../outside.txt", "{root}/outside.txt"])
def test_paths_that_leave_the_bundle(bundle_copy: Path, name: str) -> None:
    outside = bundle_copy.parent / "outside.txt"
    outside.write_text("secret")
    list_file(bundle_copy, name.format(root=bundle_copy.parent), outside)
    assert "lies outside the bundle" in one_error(bundle_copy)


def test_name_that_no_file_can_have(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda d: d["files"].update({"x" * 300: {"size": 1, "sha256": ""}}))
    assert "xxx" in one_error(bundle_copy)


def test_link_that_leaves_the_bundle(bundle_copy: Path) -> None:
    outside = bundle_copy.parent / "outside.bin"
    (bundle_copy / "weights.bin").rename(outside)
    (bundle_copy / "weights.bin").symlink_to(outside)
    assert "weights.bin is missing or a link to outside the bundle" in one_error(bundle_copy)
    (bundle_copy / "weights.bin").unlink()
    (bundle_copy / "weights.bin").symlink_to("weights.bin")  # a loop
    assert "weights.bin is missing" in one_error(bundle_copy)


def test_link_to_a_bundle_is_fine(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(demo_bundle)
    assert Bundle.open(tmp_path / "link").manifest.precisions == (4, 3, 2)


# Manifests that are consistent in themselves but lie about the graphs are found when ONNX Runtime looks.
@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["graphs"][0].update(file="tokenizer.json"),
        lambda d: d["graphs"][0].update(file="decode-2.onnx"),
        lambda d: (d["kv_cache"].update(heads=1), d["architecture"].update(kv_heads=1)),
        lambda d: d["kv_cache"].update(head_dim=80),
        lambda d: (d["kv_cache"].update(layers=4), d["architecture"].update(layers=4)),
        lambda d: (d["kv_cache"].update(layers=6), d["architecture"].update(layers=6)),
        lambda d: d["kv_cache"].update(dtype="float32"),
        lambda d: d["kv_cache"].update(past="past.{layer}.{part}"),
        lambda d: d["architecture"].update(vocab_size=100),
    ],
)
def test_manifest_that_does_not_fit_the_graphs(bundle_copy: Path, edit: Callable[[Any], object]) -> None:
    edit_manifest(bundle_copy, edit)
    bundle = Bundle.open(bundle_copy)

    def use() -> None:
        generator = Generator(bundle, threads=1, context_length=16, precisions=[2])
        generator.prefill([1, 5])
        generator.decode_step(7, precision=2)

    with pytest.raises(PmpdError, match=r"refuses|failed while running|not an ONNX|disagree about") as caught:
        use()
    assert "\n" not in str(caught.value)


def test_kv_cache_beyond_memory(bundle_copy: Path) -> None:
    heads = 2**31 - 1
    edit_manifest(
        bundle_copy,
        lambda d: (
            d["kv_cache"].update(heads=heads),
            d["architecture"].update(kv_heads=heads, attention_heads=heads),
        ),
    )
    with pytest.raises(PmpdError, match="no memory for a KV cache of 16 positions"):
        Generator(Bundle.open(bundle_copy), context_length=16)


@pytest.fixture(scope="module")
def fuzzed(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A copy whose bundle.json is overwritten again and again, and what it said at first."""
    path = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("fuzz") / "copy"))
    return path, (path / "bundle.json").read_bytes()


def places(document: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every node under the root."""
    if isinstance(document, dict):
        children: list[tuple[str | int, Any]] = list(document.items())
    else:
        children = list(enumerate(document)) if isinstance(document, list) else []
    return [place for key, child in children for place in [(*path, key), *places(child, (*path, key))]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def check_opens_or_refuses(path: Path) -> None:
    try:
        bundle = Bundle.open(path)
    except BundleError:
        return
    for tensor in bundle.manifest.tensors:
        bundle.tensor(tensor)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_change_of_the_json_opens_or_is_refused(fuzzed: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = fuzzed
    document = copy.deepcopy(json.loads(original))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places(document)))
        node = document
        for key in parents:
            node = node[key]
        if data.draw(st.booleans()):
            node[last] = data.draw(json_values)
        else:
            del node[last]
    (path / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    check_opens_or_refuses(path)


@settings(max_examples=100)
@given(data=st.data())
def test_any_change_of_the_bytes_opens_or_is_refused(fuzzed: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = fuzzed
    text = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (path / "bundle.json").write_bytes(text)
    check_opens_or_refuses(path)
