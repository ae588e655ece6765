"""Mixes in `bundle.json`: what they read of each layer, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from test_manifest import Document, manifest

from pmpd.runtime import BundleError, Manifest


def mixed_document() -> Document:
    """A manifest with a second layer of the same shape, and a mix: 3 planes of one and 2 of the other."""
    changed: Document = json.loads(manifest().to_json())
    for entry in changed["tensors"][:4]:
        changed["tensors"].append(
            entry | {"name": entry["name"].replace("a.", "b."), "layer": "b", "offset": entry["offset"] + 640}
        )
    changed["files"]["w.bin"]["size"] = 1160
    changed["files"]["decode-2.5.onnx"] = changed["files"]["decode-3.onnx"]
    changed["graphs"].append(changed["graphs"][1] | {"file": "decode-2.5.onnx", "precision": 2.5})
    return changed | {"precisions": [3, 2.5, 2], "mixes": {"2.5": {"a": 3, "b": 2}}}


def test_a_mix_reads_what_it_says_of_each_layer() -> None:
    read = Manifest.from_json(json.dumps(mixed_document()))
    assert Manifest.from_json(read.to_json()) == read
    books = {precision: {t.name for t in read.tensors_at(precision) if t.role == "codebook"} for precision in (3, 2.5)}
    assert books == {3: {"a.codebook.3", "b.codebook.3"}, 2.5: {"a.codebook.3", "b.codebook.2"}}
    planes = {tensor.layer: tensor for tensor in read.tensors if tensor.role == "planes"}
    assert {layer: read.shape_at(tensor, 2.5) for layer, tensor in planes.items()} == {"a": (3, 2, 64), "b": (2, 2, 64)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(mixes={}), "bundle.json has no mix for 2.5 bits"),
        (lambda d: d["mixes"].update({"2": {"a": 2, "b": 2}}), "the mix '2' is none of the bundle's precisions"),
        (lambda d: d["mixes"]["2.5"].pop("b"), "the mix '2.5' does not say how many planes it reads of 'b'"),
        (lambda d: d["mixes"]["2.5"].update(c=2), "the mix '2.5' names a layer that is not nested, 'c'"),
        (lambda d: d["mixes"]["2.5"].update(a=4), "the mix '2.5' reads 4 planes of 'a', which has 3"),
        (lambda d: d["mixes"]["2.5"].update(a=0), "the mix '2.5' reads 0 planes of 'a'"),
        (lambda d: d["mixes"]["2.5"].update(b=3), "the mix '2.5' reads 3.000 planes in the mean"),
        (lambda d: d["mixes"]["2.5"].update(a=2), "the mix '2.5' reads 2.000 planes in the mean"),
        (lambda d: d["mixes"]["2.5"].update(a=2.0), "a must be int, got 2.0"),
        (lambda d: (d["precisions"].pop(), d["tensors"].pop(-2)), "layer 'b' cannot be read at 2 bits"),
        (lambda d: d["graphs"][0].update(precision=2.25), "bundle.json has no mix for 2.25 bits"),
        (lambda d: d.update(precisions=[3, 2.5, 2.0]), "with two decimals at most"),
        (lambda d: d.update(precisions=[3, 2.505, 2]), "with two decimals at most"),
        (lambda d: d.update(precisions=[3, "2.5", 2]), "precisions[1] must be int, got '2.5'"),
        (lambda d: d.update(version=3), "the field 'mixes', which version 3 does not know"),
        (lambda d: (d.update(version=3), d.pop("mixes")), "precisions [3, 2.5, 2] must be whole in version 3"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(edit: Callable[[Document], object], message: str) -> None:
    changed = mixed_document()
    edit(changed)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(changed))
    assert message in str(caught.value)
