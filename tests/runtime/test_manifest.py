"""`bundle.json`: what it says survives the round trip, and what does not fit is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.runtime import BundleError, Manifest
from pmpd.runtime.format.manifest import Architecture, FileEntry, Graph, KvContract, Source, Tensor, contained_name
from pmpd.runtime.format.quality import PrecisionQuality, Quality

Document = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "golden"


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
        schedules={"default": "static:3@0,2@5", "full": "uniform:3"},
        default_schedule="default",
        kv_cache=KvContract(layers=2, heads=1, head_dim=4),
        graphs=(
            Graph(file="prefill.onnx", phase="prefill", precision=3),
            Graph(file="decode-3.onnx", phase="decode", precision=3),
            Graph(file="decode-2.onnx", phase="decode", precision=2),
        ),
        tensors=(
            Tensor(
                name="a.planes",
                file="w.bin",
                offset=0,
                length=6 * 64,
                dtype="uint8",
                shape=(3, 2, 64),
                role="planes",
                layer="a",
                bits=3,
                nested=True,
            ),
            *(
                Tensor(
                    name=f"a.codebook.{bits}",
                    file="w.bin",
                    offset=offset,
                    length=4 * 2**bits,
                    dtype="float16",
                    shape=(2, 1, 2**bits),
                    role="codebook",
                    layer="a",
                    bits=bits,
                )
                for bits, offset in ((3, 384), (2, 448))
            ),
            Tensor(
                name="a.bias", file="w.bin", offset=512, length=8, dtype="float32", shape=(2,), role="bias", layer="a"
            ),
            Tensor(name="norm.weight", file="w.bin", offset=576, length=16, dtype="float32", shape=(4,), role="norm"),
        ),
        files={
            name: FileEntry(size=592, sha256="0" * 64)
            for name in ("w.bin", "prefill.onnx", "decode-3.onnx", "decode-2.onnx", "kernels/libpmpd.so")
        },
        configuration={"precisions": [3, 2], "nested": {"any": None}},
        kernels={"linux-x86_64": "kernels/libpmpd.so"},
        accuracy="int8",
    )


def old_document() -> Document:
    """The same manifest as version 1 had it, where names said what tensors were for."""
    old = document()
    for name in ("schedules", "default_schedule", "verified", "skeleton", "mixes"):
        del old[name]
    for tensor in old["tensors"]:
        del tensor["role"], tensor["layer"], tensor["bits"]
    for graph in old["graphs"]:
        del graph["activations"], graph["device"]
    return old | {"version": 1, "schedule": "static:3@0,2@5"}


def document() -> Document:
    loaded: Document = json.loads(manifest().to_json())
    return loaded


def test_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()
    assert document()["format"] == "pmpd-bundle"
    assert document()["version"] == 4


def test_the_text_of_version_4_is_fixed() -> None:
    text = (GOLDEN / "v2-bundle.json").read_text(encoding="utf-8").replace('"version": 2,', '"version": 4,')
    assert manifest().to_json() == text.removesuffix("\n}\n") + ',\n "mixes": {}\n}\n'


def test_a_manifest_of_version_2_is_upgraded() -> None:
    text = (GOLDEN / "v2-bundle.json").read_text(encoding="utf-8")
    assert Manifest.from_json(text) == manifest()


def with_quality() -> Manifest:
    rows = (
        PrecisionQuality(precision=bits, kl=0.5 / bits, kl_ci95=0.01, top1=0.25 * bits, perplexity=20.0)
        for bits in (3, 2)
    )
    return replace(manifest(), quality=Quality(text="a text", tokens=512, perplexity=18.5, precisions=tuple(rows)))


def test_quality_survives_the_round_trip() -> None:
    assert Manifest.from_json(with_quality().to_json()) == with_quality()
    assert Manifest.from_json(json.dumps(json.loads(with_quality().to_json()) | {"quality": None})) == manifest()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q.pop("tokens"), "quality has no field 'tokens'"),
        (lambda q: q.update(tokens=0), "quality of 0 tokens"),
        (lambda q: q.update(perplexity=math.inf), "of perplexity inf"),
        (lambda q: q.update(text="\x1b[31m"), r"quality was measured on '\x1b[31m', which is not a plain name"),
        (lambda q: q.update(text="x" * 101), "which is not a plain name"),
        (lambda q: q["precisions"].pop(), "quality was measured at [3] bits, the bundle has [3, 2]"),
        (lambda q: q["precisions"][0].update(kl=math.nan), "quality at 3 bits is nan, 0.01, 0.75, 20.0"),
        (lambda q: q["precisions"][1].update(kl=-0.1), "quality at 2 bits is -0.1"),
        (lambda q: q["precisions"][1].update(top1=1.5), "quality at 2 bits is 0.25, 0.01, 1.5"),
        (lambda q: q["precisions"][1].update(kl=1), "kl must be float, got 1"),
    ],
)
def test_a_quality_that_cannot_be_is_refused(edit: Callable[[Document], object], message: str) -> None:
    changed = json.loads(with_quality().to_json())
    edit(changed["quality"])
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(changed))
    assert message in str(caught.value)


def test_a_role_that_version_2_does_not_know_is_refused_there() -> None:
    changed = coarse_document() | {"version": 2}
    del changed["mixes"]
    with pytest.raises(BundleError, match=r"'head\.basis' has the role 'basis', which version 2 does not know"):
        Manifest.from_json(json.dumps(changed))


def coarse_document() -> Document:
    """The same manifest with an output layer of 3 planes that is not nested, its 2-bit codebook and a bound."""
    changed = document()
    for entry in changed["tensors"][:3]:
        nested, name = False, entry["name"].replace("a.", "head.")
        changed["tensors"].append(
            entry | {"name": name, "layer": "head", "nested": nested, "offset": entry["offset"] + 640}
        )
    head = changed["tensors"][3] | {"layer": "head", "length": 8}
    changed["tensors"].append(head | {"name": "head.basis", "role": "basis", "shape": [1, 2], "offset": 1216})
    changed["tensors"].append(
        head | {"name": "head.bound", "role": "bound", "dtype": "float16", "shape": [2, 2], "offset": 1152}
    )
    changed["files"]["w.bin"]["size"] = 1224
    return changed


def test_an_output_layer_may_have_a_coarse_codebook_and_a_bound() -> None:
    read = Manifest.from_json(json.dumps(coarse_document()))
    assert read.optional_tensors == {"head.codebook.2", "head.basis", "head.bound"}
    for precision in read.precisions:  # the layer is not nested: graphs of all precisions may read all of it
        names = {tensor.name for tensor in read.tensors_at(precision)}
        assert {"head.planes", "head.codebook.3", "head.codebook.2", "head.basis", "head.bound"} <= names


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["tensors"][-1].update(length=4, shape=[2, 1]), "tensor 'head.bound' has 1 rows, the planes"),
        (lambda d: d["tensors"][-1].update(length=16, dtype="float32"), "must be float16 [B, N], got float32 [2, 2]"),
        (lambda d: d["tensors"][-2].update(length=4, dtype="float16"), "must be float32 [D, K], got float16 [1, 2]"),
        (lambda d: d["tensors"].pop(-2), "layer 'head' has a bound without a basis"),
        (lambda d: d["tensors"].pop(-1), "layer 'head' has a basis without a bound"),
        (lambda d: d["tensors"][-1].update(layer="a"), "(bound) belongs to a layer without a coarse codebook"),
        (lambda d: d["tensors"][-1].update(layer=None), "tensor 'head.bound' (bound) must name its layer"),
        (lambda d: d["tensors"][-1].update(bits=2), "tensor 'head.bound' (bound) has no bits"),
        (lambda d: d["tensors"].pop(-3), "(basis) belongs to a layer without a coarse codebook"),
        (
            lambda d: d["tensors"][-3].update(bits=4, shape=[2, 1, 16], length=64),
            "tensor 'head.codebook.2' is for 4 bits, the planes of its layer are 3",
        ),
    ],
)
def test_what_contradicts_a_coarse_output_layer_is_named(edit: Callable[[Document], object], message: str) -> None:
    changed = coarse_document()
    edit(changed)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(changed))
    assert message in str(caught.value)


def embedding_document() -> Document:
    """The same manifest with an embedding in 2 planes."""
    added = document()
    shared = {"file": "w.bin", "role": "embedding", "layer": None, "bits": None, "nested": False}
    added["tensors"] += [
        {**shared, "name": "e.planes", "offset": 640, "length": 2 * 16 * 64, "dtype": "uint8", "shape": [2, 16, 64]},
        {**shared, "name": "e.codebook.2", "offset": 2688, "length": 128, "dtype": "float16", "shape": [16, 1, 4]},
    ]
    added["files"]["w.bin"]["size"] = 2816
    return added


def test_an_embedding_may_be_stored_in_planes() -> None:
    read = Manifest.from_json(json.dumps(embedding_document()))
    for precision in read.precisions:  # in every graph alike
        assert {"e.planes", "e.codebook.2"} <= {tensor.name for tensor in read.tensors_at(precision)}


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["tensors"].pop(-1),
        lambda d: d["tensors"][-1].update(shape=[8, 1, 8]),
        lambda d: d["tensors"][-1].update(shape=[16, 2, 2]),
        lambda d: d["tensors"][-1].update(shape=[16, 4]),
        lambda d: d["tensors"][-1].update(dtype="float32", shape=[8, 1, 4]),
        lambda d: d["tensors"][-2].update(shape=[4, 8, 64]),
        lambda d: d["tensors"][-2].update(shape=[2048]),
        lambda d: d["tensors"].append(
            {**d["tensors"][-1], "name": "e.codebook.1", "offset": 2816, "shape": [16, 1, 4]}
        ),
    ],
)
def test_planes_and_codebook_of_an_embedding_belong_together(edit: Callable[[Document], object]) -> None:
    changed = embedding_document()
    changed["files"]["w.bin"]["size"] = 4096
    edit(changed)
    with pytest.raises(BundleError, match=r"the embedding 'e\.planes' must be uint8 \[P, V, S\] and float16 \[V, G, 2"):
        Manifest.from_json(json.dumps(changed))


def test_a_manifest_of_version_1_is_upgraded() -> None:
    assert Manifest.from_json(json.dumps(old_document())) == replace(
        manifest(), schedules={"default": "static:3@0,2@5"}, verified=False
    )
    assert Manifest.from_json(json.dumps(old_document() | {"verification": {"decode": {}}})).verified


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("schedule"), "bundle.json has no field 'schedules'"),
        (lambda d: d.update(tensors=7), "bundle.json: tensors must be list, got 7"),
        (lambda d: d.update(tensors=[7]), "bundle.json: tensors[0] must be dict, got 7"),
        (lambda d: d["tensors"][0].pop("name"), "bundle.json: tensors[0] has no field 'name'"),
        (lambda d: d["tensors"][0].update(name=7), "bundle.json: tensors[0]: name must be str, got 7"),
        (lambda d: d["tensors"][0].update(shape=[]), "claims 384 bytes at 0, but uint8 [] takes 1"),
        (lambda d: d["tensors"][1].update(name="a.codebook.99"), "layer 'a' cannot be read at 3 bits"),
        (lambda d: d["tensors"][1].update(name="a.codebook.²"), "layer 'a' cannot be read at 3 bits"),
        (lambda d: d.update(schedules={}), "has the field 'schedules', which version 1 does not know"),
        (lambda d: d["tensors"][0].update(role="norm"), "has the field 'role', which version 1 does not know"),
        (lambda d: d.update(schedule=7), "bundle.json: schedules: default must be str, got 7"),
    ],
)
def test_faults_of_version_1_are_named(edit: Callable[[Document], object], message: str) -> None:
    old = old_document()
    edit(old)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(old))
    assert message in str(caught.value)


def test_a_manifest_from_before_kernels_is_read() -> None:
    old = old_document()
    del old["kernels"], old["accuracy"]
    read = Manifest.from_json(json.dumps(old))
    assert (read.kernels, read.accuracy) == ({}, "exact")


def test_graph_is_found_by_phase_and_precision() -> None:
    assert manifest().graph("decode", 2).file == "decode-2.onnx"
    with pytest.raises(BundleError, match=r"no prefill graph at 2 bits for cpu: it has \[3, 2\]"):
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
        (drop("version"), "has version None, this runtime reads versions 1 to 4"),
        (change("version", to=5), "has version 5, this runtime reads versions 1 to 4: upgrade pmpd"),
        (change("version", to=True), "has version True"),
        (change("version", to=2.0), "has version 2.0"),
        (drop("default_schedule"), "bundle.json has no field 'default_schedule'"),
        (change("default_schedule", to="fast"), "unknown default schedule 'fast': choose one of default, full"),
        (drop("tensors", 1, "shape"), "bundle.json: tensors[1] has no field 'shape'"),
        (change("graphs", 0, "phase", to="verify"), "graph 'prefill.onnx': unknown phase 'verify'"),
        (change("graphs", 0, "device", to="abacus"), "graph 'prefill.onnx': unknown device 'abacus'"),
        (change("graphs", 0, "device", to="cuda"), "the bundle has no"),
        (change("graphs", 0, "activations", to="int4"), "graph 'prefill.onnx': unknown activation type 'int4'"),
        (change("graphs", 0, to=document()["graphs"][1]), "two graphs of one device, phase and precision"),
        (change("tensors", 0, "role", to="magic"), "tensor 'a.planes': unknown role 'magic': choose one of"),
        (change("tensors", 0, "layer", to=None), "tensor 'a.planes' (planes) must name its layer"),
        (change("tensors", 4, "layer", to="a"), "tensor 'norm.weight' (norm) cannot belong to the layer 'a'"),
        (change("tensors", 4, "bits", to=3), "tensor 'norm.weight' (norm) has no bits"),
        (change("tensors", 4, "nested", to=True), "tensor 'norm.weight' (norm) has no bits and no planes to be nested"),
        (change("tensors", 1, "nested", to=True), "tensor 'a.codebook.3' (codebook) cannot be nested"),
        (change("tensors", 0, "bits", to=2), "of 2 bits must be uint8 [2, N, S], got uint8 [3, 2, 64]"),
        (change("tensors", 0, "bits", to=9), "must have 1 to 8 bits, got 9"),
        (change("tensors", 1, "bits", to=2), "of 2 bits must be float16 [N, G, 4], got float16 [2, 1, 8]"),
        (change("tensors", 1, "shape", to=[1, 2, 8]), "has 1 rows, the planes of its layer have 2"),
        (change("tensors", 3, "layer", to="b"), "tensor 'a.bias' has 2 rows, the planes of its layer have 0"),
        (change("tensors", 4, "name", to="a.bias"), "lists tensor 'a.bias' twice"),
        (change("tensors", 4, to={**document()["tensors"][3], "name": "z"}), "lists tensor 'z' twice"),
        (drop("tensors", 2), "layer 'a' cannot be read at 2 bits"),
        (change("surprise", to=1), "unknown field 'surprise'"),
        (change("source", "surprise", to=1), "bundle.json: source has the unknown field 'surprise'"),
        (change("context_length", to="64"), "bundle.json: context_length must be int, got '64'"),
        (change("context_length", to=64.0), "context_length must be int, got 64.0"),
        (change("context_length", to=True), "context_length must be int, got True"),
        (change("context_length", to=0), "context length must be 1 to 2,147,483,647, got 0"),
        (change("graphs", to={}), "bundle.json: graphs must be list"),
        (change("graphs", 1, to=7), "bundle.json: graphs[1] must be dict, got 7"),
        (change("files", to=[]), "bundle.json: files must be dict"),
        (change("precisions", to=["3"]), "bundle.json: precisions[0] must be int, got '3'"),
        (change("precisions", to=[]), "precisions must fall from high to low"),
        (change("precisions", to=[2, 3]), "precisions must fall from high to low"),
        (change("precisions", to=[3, 3]), "without repeats"),
        (change("precisions", to=[4, 3]), "no decode graph at 4 bits for cpu"),
        (change("prefill_precision", to=2), "no prefill graph at 2 bits for cpu"),
        (change("architecture", "vocab_size", to=0), "vocab_size must be 1 or more, got 0"),
        (change("kv_cache", "heads", to=-3), "heads must be 1 or more, got -3"),
        (change("kv_cache", "dtype", to="bfloat8"), "unknown type 'bfloat8'"),
        *(
            (
                change("kv_cache", part, to=name),
                f"names buffers {name!r:.60}: {{layer}} and {{part}} must each appear once",
            )
            for part in ("past", "present")
            for name in (
                *("", "{", "{oops}", "{layer}{part}{", "{layer}.{part}.{layer}", "past.{layer}", "{part}", "{0}{part}"),
                *(
                    "{layer:>9000000000}.{part}",
                    "{layer.real}.{part}",
                    "{layer!r}.{part}",
                    "{layer}{part}" + "x" * 10**6,
                ),
            )
        ),
        (change("tensors", 0, "dtype", to="int3"), "tensor 'a.planes': unknown type 'int3': choose one of"),
        (change("tensors", 0, "length", to=383), "claims 383 bytes at 0, but uint8 [3, 2, 64] takes 384"),
        (change("tensors", 0, "offset", to=-1), "claims 384 bytes at -1"),
        (change("tensors", 0, "shape", to=[-3, -2, 64]), "claims 384 bytes at 0, but uint8 [-3, -2, 64]"),
        (change("tensors", 4, to={**document()["tensors"][4], "shape": [0, 2**62], "length": 0}), "claims 0 bytes"),
        (change("tensors", 4, "offset", to=640), "tensor 'norm.weight' ends at byte 656 of w.bin, which has 592"),
        (change("tensors", 4, "offset", to=577), "tensor 'norm.weight' begins at byte 577, not at a multiple of 64"),
        (change("tensors", 4, "offset", to=384), "tensors 'a.codebook.3' and 'norm.weight' overlap in w.bin"),
        (change("tensors", 4, "shape", to=[4, 1, 1, 1, 1]), "more than 4 dimensions"),
        (change("tensors", 4, "name", to="x" * 10**6), "has no name or a very long one"),
        (change("precisions", to=[99]), "precisions must be 1 to 8 bits"),
        (change("prefill_precision", to=0), "precisions must be 1 to 8 bits"),
        (change("parent_precision", to=9), "precisions must be 1 to 8 bits"),
        (change("kv_cache", "layers", to=3), "the KV cache of 3 layers and 1 heads of 4 does not fit the architecture"),
        (change("kv_cache", "heads", to=2), "the KV cache of 2 layers and 2 heads of 4 does not fit the architecture"),
        (change("kv_cache", "head_dim", to=3), "the KV cache of 2 layers and 1 heads of 3 does not fit"),
        (change("architecture", "layers", to=100_000), "layers must be at most 10,000, got 100000"),
        (change("architecture", "hidden_size", to=10**30), "hidden_size must be at most 2,147,483,647"),
        (change("architecture", "kv_heads", to=3), "2 attention heads cannot share 3 key and value heads"),
        (change("context_length", to=2**62), "context length must be 1 to 2,147,483,647, got 4611686018427387904"),
        (
            change("schedules", "default", to="sometimes"),
            "schedule 'default' is 'sometimes', which does not",
        ),
        (change("schedules", "default", to="static:3@0,\n2@5"), "does not have the form KIND:ARGUMENTS"),
        (change("schedules", "a b", to="uniform:3"), "schedule 'a b' is 'uniform:3'"),
        (change("schedules", to={str(i): "uniform:3" for i in range(1001)}), "lists 1,001 schedules"),
        (change("files", "decode-2.onnx", "size", to=2**27), "decode-2.onnx is larger than 67,108,864 bytes"),
        (change("files", "kernels/libpmpd.so", "size", to=2**40), "bytes besides the weights"),
        (change("files", "w.bin", "size", to=-1), "lists a file of -1 bytes"),
        (change("tensors", 1, "file", to="other.bin"), "refers to 'other.bin' but does not list it"),
        (change("graphs", 0, "file", to="other.onnx"), "refers to 'other.onnx' but does not list it"),
        (drop("files", "w.bin"), "refers to 'w.bin' but does not list it"),
        (change("tensors", 1, "file", to="../w.bin"), "names the file '../w.bin', which lies outside"),
        (change("kernels", "arm", to="other.so"), "refers to 'other.so' but does not list it"),
        (change("kernels", "arm", to="/lib/libc.so.6"), "names the file '/lib/libc.so.6', which lies outside"),
        (change("kernels", "a b", to="kernels/libpmpd.so"), "has kernels for 'a b', which is not a name"),
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


def test_a_key_that_appears_twice_is_refused() -> None:
    text = json.dumps(document())
    for again in ('"version": 3,', '"precisions": [2], "precisions": [3, 2],'):
        with pytest.raises(BundleError, match=r"the key '\w+' appears twice in one object"):
            Manifest.from_json("{" + again + text[1:])


def test_buffers_are_named_by_layer_and_part() -> None:
    contract = replace(manifest().kv_cache, past="p{layer}{part}", present="{part}/{layer}")
    assert (contract.past_name(12, "key"), contract.present_name(0, "value")) == ("p12key", "value/0")


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
