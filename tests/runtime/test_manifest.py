"""`bundle.json`: what it says survives the round trip, and what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.runtime import BundleError, Manifest
from pmpd.runtime.format.manifest import Architecture, FileEntry, Graph, KvContract, Source, Tensor, contained_name

Document = dict[str, Any]


def manifest() -> Manifest:
    return Manifest(
        producer="a test",
        source=Source(model="nobody/nothing", license="apache-2.0"),
        architecture=Architecture(
            family="llama",
            layers=2,
            hidden_size=8,
            attention_heads=2,
            kv_heads=1,
            head_dim=4,
            vocab_size=16,
            parameters=1234,
        ),
        context_length=64,
        precisions=(3, 2),
        parent_precision=3,
        prefill_precision=3,
        schedule="static:3@0,2@5",
        kv_cache=KvContract(layers=2, heads=1, head_dim=4),
        graphs=(
            Graph(file="prefill.onnx", phase="prefill", precision=3),
            Graph(file="decode-3.onnx", phase="decode", precision=3),
            Graph(file="decode-2.onnx", phase="decode", precision=2),
        ),
        tensors=(
            Tensor(name="a", file="w.bin", offset=0, length=6 * 64, dtype="uint8", shape=(3, 2, 64), nested=True),
            Tensor(name="b", file="w.bin", offset=384, length=16, dtype="float32", shape=(4,)),
        ),
        files={
            name: FileEntry(size=400, sha256="0" * 64)
            for name in ("w.bin", "prefill.onnx", "decode-3.onnx", "decode-2.onnx", "kernels/libpmpd.so")
        },
        configuration={"precisions": [3, 2], "nested": {"any": None}},
        kernels={"linux-x86_64": "kernels/libpmpd.so"},
        accuracy="int8",
    )


def document() -> Document:
    loaded: Document = json.loads(manifest().to_json())
    return loaded


def test_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()
    assert document()["format"] == "pmpd-bundle"
    assert document()["version"] == 1


def test_a_manifest_from_before_kernels_is_read() -> None:
    old = document()
    del old["kernels"], old["accuracy"]
    read = Manifest.from_json(json.dumps(old))
    assert (read.kernels, read.accuracy) == ({}, "exact")


def test_graph_is_found_by_phase_and_precision() -> None:
    assert manifest().graph("decode", 2).file == "decode-2.onnx"
    with pytest.raises(BundleError, match=r"no prefill graph at 2 bits: it has \[3, 2\]"):
        manifest().graph("prefill", 2)


def change(*path: str | int, to: Any) -> Callable[[Document], None]:
    def edit(place: Any) -> None:
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return edit


def drop(*path: str | int) -> Callable[[Document], None]:
    def edit(place: Any) -> None:
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("format"), "does not say format 'pmpd-bundle'"),
        (change("format", to="gguf"), "does not say format 'pmpd-bundle'"),
        (drop("version"), "has version None, this runtime reads version 1"),
        (change("version", to=2), "has version 2, this runtime reads version 1: upgrade pmpd"),
        (drop("schedule"), "bundle.json is incomplete"),
        (drop("tensors", 1, "shape"), "bundle.json: tensors[1] is incomplete"),
        (change("surprise", to=1), "unknown field 'surprise'"),
        (change("source", "surprise", to=1), "bundle.json: source has the unknown field 'surprise'"),
        (change("context_length", to="64"), "bundle.json: context_length must be int, got '64'"),
        (change("context_length", to=64.0), "context_length must be int, got 64.0"),
        (change("context_length", to=True), "context_length must be int, got True"),
        (change("context_length", to=0), "context length must be 1 or more, got 0"),
        (change("graphs", to={}), "bundle.json: graphs must be list"),
        (change("graphs", 1, to=7), "bundle.json: graphs[1] must be dict, got 7"),
        (change("files", to=[]), "bundle.json: files must be dict"),
        (change("precisions", to=["3"]), "bundle.json: precisions[0] must be int, got '3'"),
        (change("precisions", to=[]), "precisions must fall from high to low"),
        (change("precisions", to=[2, 3]), "precisions must fall from high to low"),
        (change("precisions", to=[3, 3]), "without repeats"),
        (change("precisions", to=[4, 3]), "no decode graph at 4 bits"),
        (change("prefill_precision", to=2), "no prefill graph at 2 bits"),
        (change("architecture", "vocab_size", to=0), "vocab_size must be 1 or more, got 0"),
        (change("kv_cache", "heads", to=-3), "heads must be 1 or more, got -3"),
        (change("kv_cache", "dtype", to="bfloat8"), "unknown type 'bfloat8'"),
        (change("kv_cache", "past", to="{oops}"), "only {layer} and {part} may vary"),
        (change("kv_cache", "present", to="{"), "only {layer} and {part} may vary"),
        (change("tensors", 0, "dtype", to="int3"), "tensor 'a' has the unknown type 'int3'"),
        (change("tensors", 0, "length", to=383), "claims 383 bytes at 0, but uint8 [3, 2, 64] takes 384"),
        (change("tensors", 0, "offset", to=-1), "claims 384 bytes at -1"),
        (change("tensors", 0, "shape", to=[-3, -2, 64]), "claims 384 bytes at 0, but uint8 [-3, -2, 64]"),
        (change("tensors", 1, to={**document()["tensors"][1], "shape": [0, 2**62], "length": 0}), "claims 0 bytes"),
        (change("tensors", 1, "offset", to=385), "tensor 'b' ends at byte 401 of w.bin, which has 400"),
        (change("tensors", 1, "file", to="other.bin"), "refers to 'other.bin' but does not list it"),
        (change("graphs", 0, "file", to="other.onnx"), "refers to 'other.onnx' but does not list it"),
        (drop("files", "w.bin"), "refers to 'w.bin' but does not list it"),
        (change("tensors", 1, "file", to="../w.bin"), "names the file '../w.bin', which lies outside"),
        (change("kernels", "arm", to="other.so"), "refers to 'other.so' but does not list it"),
        (change("kernels", "arm", to="/lib/libc.so.6"), "names the file '/lib/libc.so.6', which lies outside"),
        (change("kernels", "arm", to=7), "bundle.json: kernels: arm must be str, got 7"),
        (change("accuracy", to="int4"), "unknown accuracy 'int4': choose one of int8, exact"),
        (change("accuracy", to=8), "bundle.json: accuracy must be str, got 8"),
        (change("files", "../x", to={"size": 1, "sha256": ""}), "names the file '../x', which lies outside"),
    ],
)
def test_what_does_not_fit_is_named(edit: Callable[[Document], None], message: str) -> None:
    changed = document()
    edit(changed)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "17", '"x"', "\x00", "[" * 100_000, "9" * 5000, "{} {}"])
def test_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Manifest.from_json(text)


@pytest.mark.parametrize("name", ["weights.bin", "kernels/linux/libpmpd.so", "a..b", "...", "größe.txt", "a b"])
def test_names_inside_the_bundle(name: str) -> None:
    assert contained_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/x", "\\\\host\\x", "..\\x", "C:x", "C:/x"),
        *("./x", "a//b", "a/", "a\0b", "a\nb", "\x1b[31mred", "\ud800"),
    ],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(BundleError, match="lies outside the bundle") as caught:
        contained_name(name)
    assert str(caught.value).isprintable()  # safe to show in a terminal


@given(st.text(alphabet="./\\:ab\0\n", max_size=12))
def test_accepted_names_stay_inside(name: str) -> None:
    try:
        contained_name(name)
    except BundleError:
        return
    parts = name.split("/")
    assert all(part not in ("", ".", "..") for part in parts)
