"""The peers themselves, on tiny random models: skipped where their packages are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from pmpd.eval.speed.contenders import PEERS, ModelShape, Process, make_models

# The Python that has the peers' packages; `pmpd-eval speed` calls it --peer-python.
PYTHON = os.environ.get("PMPD_PEER_PYTHON", sys.executable)
SHAPE = ModelShape(
    family="llama",
    layers=2,
    hidden_size=256,
    intermediate_size=512,
    attention_heads=4,
    kv_heads=2,
    head_dim=64,
    rotary_dim=64,
    vocab_size=512,
    context_length=128,
)


@pytest.mark.parametrize(
    ("peer", "variants", "modules"),
    [
        ("llama.cpp", ["Q4_0", "Q2_K"], "llama_cpp, gguf"),
        ("onnxruntime-genai", ["int4g32", "int2g128"], "onnxruntime_genai, onnx_ir, torch, transformers"),
    ],
)
def test_a_peer_makes_its_models_and_runs_them(peer: str, variants: list[str], modules: str, tmp_path: Path) -> None:
    check = subprocess.run([PYTHON, "-c", f"import {modules}"], capture_output=True, text=True, check=False)
    if check.returncode:
        missing = check.stderr.strip().splitlines()[-1]
        pytest.skip(f"{peer} needs {modules} in {PYTHON} ({missing}); PMPD_PEER_PYTHON names another Python")
    common = {"threads": 1, "positions": 24, "folder": str(tmp_path)}
    options = {**common, "shape": asdict(SHAPE), "variants": variants}
    make_models(peer, python=PYTHON, contender=PEERS[peer], options=options)
    for variant in variants:
        with Process(peer, python=PYTHON, contender=PEERS[peer], options={**common, "variant": variant}) as process:
            answer = process.run(prompt=list(range(3, 19)), tokens=[5, 6, 7, 8])
            assert process.facts["version"].split()[0] in {"llama-cpp-python", "onnxruntime-genai"}
            assert process.facts["model_bytes"] > 100_000
        assert answer["prefill_seconds"] > 0
        assert len(answer["seconds"]) == 4
        assert min(answer["seconds"]) > 0
        assert answer["peak_bytes"] > process.facts["model_bytes"]
