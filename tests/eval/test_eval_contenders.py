"""The peers themselves, on tiny models: skipped where their packages are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import plain_model, save_with_tokenizer
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pmpd.eval.speed.contenders import PEERS, ModelShape, Process, make_models
from pmpd.eval.speed.contenders.importance import write_importance
from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.calibrate.text import text_tokens
from pmpd.exporter.config import BUILT_IN
from pmpd.exporter.source.opening import open_checkpoint

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


MODULES = {
    "llama.cpp": "llama_cpp, gguf",
    "onnxruntime-genai": "onnxruntime_genai, onnx, onnx_ir, torch, transformers",
}


def need(peer: str) -> None:
    """Skip the test where a peer's packages are not installed."""
    modules = MODULES[peer]
    check = subprocess.run([PYTHON, "-c", f"import {modules}"], capture_output=True, text=True, check=False)
    if check.returncode:
        missing = check.stderr.strip().splitlines()[-1]
        pytest.skip(f"{peer} needs {modules} in {PYTHON} ({missing}); PMPD_PEER_PYTHON names another Python")


@pytest.mark.parametrize(
    ("peer", "variants", "cache_bytes"),
    [
        ("llama.cpp", ["Q4_0", "Q2_K"], 2 * 2 * 2 * 64 * 2),  # layers, keys and values, heads, float16
        ("onnxruntime-genai", ["int4g32", "int2g128"], 2 * 2 * 2 * 64 * 4),  # float32
    ],
)
def test_a_peer_makes_its_models_and_runs_them(
    peer: str, variants: list[str], cache_bytes: int, tmp_path: Path
) -> None:
    need(peer)
    common = {"threads": 1, "positions": 24, "folder": str(tmp_path)}
    options = {**common, "shape": asdict(SHAPE), "variants": variants}
    make_models(peer, python=PYTHON, contender=PEERS[peer], options=options)
    for variant in variants:
        with Process(peer, python=PYTHON, contender=PEERS[peer], options={**common, "variant": variant}) as process:
            answer = process.run(prompt=list(range(3, 19)), tokens=[5, 6, 7, 8])
            assert process.facts["version"].split()[0] in {"llama-cpp-python", "onnxruntime-genai"}
            assert process.facts["model_bytes"] > 100_000
            assert 0 < process.facts["step_bytes"] < process.facts["model_bytes"]
            assert (process.facts["cache_bytes"], process.facts["vocab_size"]) == (cache_bytes, 512)
        assert answer["prefill_seconds"] > 0
        assert len(answer["seconds"]) == 4
        assert min(answer["seconds"]) > 0
        assert answer["peak_bytes"] > process.facts["model_bytes"]


def checkpoint(folder: Path, kind: str) -> tuple[list[int], list[float]]:
    """Save a tiny random model; return a text and the log-likelihoods that transformers gives to its second half."""
    common = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=False))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))
    for parameter in model.parameters():
        if parameter.ndim == 2:  # of 4 bits already: every block of 32 is -8 to 7 times 1/64, with a -8 in it
            codes = torch.randint(-8, 8, parameter.shape)
            codes[:, ::32] = -8
            parameter.data = codes / 64
    model = model.to(torch.bfloat16)  # as models are published, and read without loss
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    ids = [(7 * i * i + 3) % 512 for i in range(32)]
    with torch.inference_mode():
        logits = model.float()(torch.tensor([ids])).logits[0, 16:-1]  # [15, V]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[17:]), reduction="none")
    return ids, nll.tolist()


def apart(values: list[float], others: list[float]) -> float:
    """Return the mean absolute difference."""
    return sum(abs(x - y) for x, y in zip(values, others, strict=True)) / len(values)


@pytest.mark.full
@pytest.mark.parametrize(
    ("peer", "kind", "variants"),
    [
        # How far the likelihoods may be apart on average, of about 6 nats; those of other weights are 1.5 apart.
        ("llama.cpp", "llama", {"F16": 0.02, "Q8_0": 0.1}),
        ("llama.cpp", "qwen2", {"F16": 0.02, "Q8_0": 0.1}),
        ("onnxruntime-genai", "llama", {"int4g32": 0.6}),
        ("onnxruntime-genai", "qwen2", {"int4g32": 0.6}),
    ],
)
def test_given_weights(peer: str, kind: str, variants: dict[str, float], tmp_path: Path) -> None:
    need(peer)
    ids, expected = checkpoint(tmp_path / "model", kind)
    common = {"threads": 1, "positions": 32, "folder": str(tmp_path)}
    options = {**common, "weights": str(tmp_path / "model"), "variants": list(variants)}
    make_models(peer, python=PYTHON, contender=PEERS[peer], options=options)
    for variant, limit in variants.items():
        with Process(peer, python=PYTHON, contender=PEERS[peer], options={**common, "variant": variant}) as process:
            nll = process.run(prompt=ids[:16], answer=ids[16:])["nll"]
        assert apart(nll, expected) < limit
    if peer == "llama.cpp":
        # The copy that is made of another GGUF file is that file's equal.
        again = {
            **common,
            "folder": str(tmp_path / "again"),
            "weights": str(tmp_path / "F16.gguf"),
            "variants": ["F16"],
        }
        (tmp_path / "again").mkdir()
        make_models(peer, python=PYTHON, contender=PEERS[peer], options=again)
        with Process(peer, python=PYTHON, contender=PEERS[peer], options={**again, "variant": "F16"}) as process:
            assert apart(process.run(prompt=ids[:16], answer=ids[16:])["nll"], expected) < 0.02


def test_the_importance_matrix_is_the_mean_square_of_inputs(tmp_path: Path) -> None:
    folder = save_with_tokenizer(tmp_path / "model")
    write_importance(folder, tmp_path / "importance.npz")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["importance.npz"]
    model = plain_model(folder)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen = inputs.setdefault(f"model.{name}.weight", [])
            module.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
    tokens = text_tokens(BUILT_IN, open_checkpoint(str(folder)).tokenizer())
    with torch.no_grad():
        for ids in calibration_batches(tokens, 64, 256):
            model.model(ids[:, :-1])
    with np.load(tmp_path / "importance.npz") as means:
        assert set(means.files) == set(inputs)
        for name, tensors in inputs.items():
            expected = torch.cat(tensors).square().mean((0, 1))
            np.testing.assert_allclose(means[name], expected, rtol=0.05, atol=1e-3 * float(expected.max()))


@pytest.mark.full
def test_llama_cpp_quantizes_with_an_importance_matrix(tmp_path: Path) -> None:
    need("llama.cpp")
    checkpoint(tmp_path / "model", "llama")
    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    sizes = {f"model.layers.{i}.{name}.weight": 512 if "down" in name else 256 for i in range(2) for name in names}
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "importance.npz", **{name: rng.random(size, np.float32) ** 8 for name, size in sizes.items()})
    make = {
        "threads": 1, "folder": str(tmp_path), "weights": str(tmp_path / "model"),
        "importance": str(tmp_path / "importance.npz"), "variants": ["Q2_K", "Q2_K_imatrix"],
    }  # fmt: skip
    make_models("llama.cpp", python=PYTHON, contender=PEERS["llama.cpp"], options=make)
    without, with_matrix = ((tmp_path / f"{variant}.gguf").read_bytes() for variant in ("Q2_K", "Q2_K_imatrix"))
    assert len(without) == len(with_matrix)
    assert without != with_matrix
