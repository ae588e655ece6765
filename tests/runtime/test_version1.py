"""A bundle that the code before version 2 of the manifest has made opens, and gives the tokens that it gave then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pmpd.runtime import Bundle, Generator

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "v1-llama.tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(Bundle.open(GOLDEN / "v1-llama", verify=True), kernels=False)


def test_it_is_a_bundle_of_version_1(generator: Generator) -> None:
    document = json.loads((GOLDEN / "v1-llama" / "bundle.json").read_text(encoding="utf-8"))
    assert (document["version"], "role" in document["tensors"][0]) == (1, False)
    manifest = generator.bundle.manifest
    assert manifest.schedules == {"default": "static:4@0,3@8,2@16"}
    assert manifest.verified
    roles = {tensor.name: (tensor.role, tensor.layer, tensor.bits) for tensor in manifest.tensors}
    layer = "model.layers.1.mlp.down_proj"
    assert roles[f"{layer}.planes"] == ("planes", layer, 4)
    assert roles[f"{layer}.codebook.3"] == ("codebook", layer, 3)
    assert roles["head_proj.planes"] == ("planes", "head_proj", 6)
    assert roles["model.embed_tokens.weight"] == ("embedding", None, None)
    assert roles["rotary.cos"] == ("rotary", None, None)
    assert roles["model.norm.weight"] == ("norm", None, None)


@pytest.mark.parametrize("schedule", RECORDED["tokens"])
def test_it_gives_the_tokens_of_its_time(generator: Generator, schedule: str) -> None:
    chosen = None if schedule == "None" else schedule
    tokens = generator.stream(RECORDED["prompt"], max_new_tokens=32, schedule=chosen)
    assert [token.id for token in tokens] == RECORDED["tokens"][schedule]


def test_it_gives_the_logits_of_its_time(generator: Generator) -> None:
    generator.reset()
    np.testing.assert_allclose(generator.prefill(RECORDED["prompt"]), RECORDED["logits_of_prompt"], atol=2e-3)
