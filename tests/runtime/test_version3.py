"""A bundle that the code before version 4 of the manifest has made opens; `tests/golden` holds it to its tokens."""

from __future__ import annotations

import json
from pathlib import Path

from pmpd.runtime import Bundle

BUNDLE = Path(__file__).parents[1] / "golden" / "v3-llama"


def test_a_bundle_of_version_3_opens() -> None:
    document = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    assert document["version"] == 3
    manifest = Bundle.open(BUNDLE, verify=True).manifest
    assert json.loads(manifest.to_json()) == document | {"version": 4, "mixes": {}}
