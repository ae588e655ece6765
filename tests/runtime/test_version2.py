"""A bundle that the code before version 3 of the manifest has made opens; `tests/golden` holds it to its tokens."""

from __future__ import annotations

import json
from pathlib import Path

from pmpd.runtime import Bundle

BUNDLE = Path(__file__).parents[1] / "golden" / "v2-llama"


def test_a_bundle_of_version_2_opens() -> None:
    document = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    assert document["version"] == 2
    manifest = Bundle.open(BUNDLE, verify=True).manifest
    assert manifest.verified
    assert json.loads(manifest.to_json()) == document | {"version": 4, "mixes": {}}
    embeddings = [tensor.name for tensor in manifest.tensors if tensor.role == "embedding"]
    assert embeddings == ["model.embed_tokens.weight"]
    assert not manifest.optional_tensors
