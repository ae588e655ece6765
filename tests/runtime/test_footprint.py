"""What several sessions cost: memory beside one weight mapping, and threads that rest between steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pmpd.exporter import ExportConfig
from pmpd.exporter.skeleton import export_skeleton
from pmpd.runtime.format.bundle import sha256_of

pytestmark = pytest.mark.full

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
MEMORY = """
import json, os, sys
from pmpd.runtime import Bundle
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.sessions import GraphRunner, LoadedGraph, StepBuffers, open_session

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

bundle = Bundle.open(sys.argv[1])
manifest = bundle.manifest
cache, step = KvCache(manifest.kv_cache, 16), StepBuffers(manifest.architecture.vocab_size)
runners, sizes = [], [resident()]
for precision in manifest.precisions:
    graph = manifest.graph("decode", precision)
    session = open_session(bundle, graph, threads=2)
    runners.append(GraphRunner(LoadedGraph(graph, bundle.path / graph.file, session, ""), cache, step))
    cache.extend(1)
    runners[-1].step(1)
    sizes.append(resident())
json.dump(sizes, sys.stdout)
"""
IDLE = """
import json, sys, time
from pmpd.runtime import Bundle, Generator

generator = Generator(Bundle.open(sys.argv[1]), context_length=16, threads=2)
seconds = 0.0
for _ in range(20):
    for precision in generator.bundle.manifest.precisions:
        generator.reset()
        generator.decode_step(1, precision=precision)
        begin = time.process_time()
        time.sleep(0.005)
        seconds += time.process_time() - begin
json.dump(seconds / (20 * len(generator.bundle.manifest.precisions) * 0.005), sys.stdout)
"""


def hollow_bundle(folder: Path, *, precisions: tuple[int, ...], **sizes: int) -> Path:
    """Write a bundle of real Llama graphs over weights that are all zero: of any size at once, nothing quantized."""
    model = folder / "model"
    model.mkdir(parents=True)
    config = {**CONFIG, **sizes, "num_key_value_heads": sizes["num_attention_heads"]}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bundle, parent = folder / "bundle", precisions[0]
    export_skeleton(ExportConfig(model=str(model), output=bundle, precisions=precisions, head_precision=parent))
    document = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    weights = bundle / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(max(tensor["offset"] + tensor["length"] for tensor in document["tensors"]))
    document["skeleton"] = False
    document["files"][weights.name] = {"size": weights.stat().st_size, "sha256": sha256_of(weights)}
    (bundle / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    return bundle


def measure(script: str, bundle: Path) -> Any:
    """Run a script on a bundle in a fresh process and return what it prints as JSON."""
    command = [sys.executable, "-c", script, str(bundle)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read resident memory")
def test_four_sessions_keep_the_weights_in_memory_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 4}
    bundle = hollow_bundle(tmp_path / "large", precisions=(8, 4, 3, 2), **sizes)
    weights = (bundle / "weights.bin").stat().st_size
    assert weights > 300e6
    before, one, *_, four = measure(MEMORY, bundle)
    assert one - before > 0.8 * weights  # all planes were read, so a second copy would show
    assert four - one < 0.25 * weights


@pytest.mark.usefixtures("all_processors")
def test_threads_of_a_session_rest_when_its_step_is_done(tmp_path: Path) -> None:
    """Sessions used in turn would otherwise fight for the processors: steps took 2.6 times as long."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    bundle = hollow_bundle(tmp_path / "small", precisions=(6, 5, 4, 3, 2, 1), **sizes)
    busy = measure(IDLE, bundle)  # processors in use while the process sleeps
    assert busy < 0.5, f"{busy:.2f} processors spin between steps"
