"""A peer: onnxruntime-genai on the CPU, on a random model of a given shape that its own model builder makes.

Stand-alone (see `serve`): needs onnxruntime-genai, onnxruntime and numpy; to make models also torch, transformers and
onnx-ir. Variants are ``int4g32``, ``int4g128``, ``int2g128``, …: bits, and columns that share a scale. The builder
knows no 2 bits: those models are its 4-bit graphs with every ``MatMulNBits`` set to 2 bits and given random weights.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Genai", "load", "make"]


class Genai:
    """A model folder, loaded once; greedy generation through its generator API."""

    def __init__(self, path: Path, *, threads: int, positions: int) -> None:
        import onnxruntime_genai

        self._api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)
        self._positions = positions
        self.facts = {
            "version": f"onnxruntime-genai {version('onnxruntime-genai')}",
            "system": f"onnxruntime {version('onnxruntime')}",
            "model_bytes": sum(file.stat().st_size for file in path.glob("model.onnx*")),
        }

    def run(self, *, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Time a prompt and as many greedy tokens after it as `tokens` are given, in seconds."""
        params = self._api.GeneratorParams(self._model)
        limit = self._positions + 1  # the last token it chooses needs no place in the cache, but counts
        params.set_search_options(max_length=limit, min_length=limit, do_sample=False)
        generator = self._api.Generator(self._model, params)
        prefill = _timed(generator.append_tokens, list(prompt))
        generator.generate_next_token()  # chooses from the prompt's logits; the model runs in the next call
        return {"prefill_seconds": prefill, "seconds": [_timed(generator.generate_next_token) for _ in tokens]}


def _timed(call: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def load(options: Mapping[str, Any]) -> Genai:
    """Load one variant of the model that `make` made."""
    folder = Path(options["folder"]) / options["variant"]
    return Genai(folder, threads=options["threads"], positions=options["positions"])


def make(options: Mapping[str, Any]) -> None:
    """Make the missing variants: a random checkpoint, and from it each quantized model."""
    folder = Path(options["folder"])
    parsed = {variant: re.fullmatch(r"int([24])g(16|32|64|128|256)", variant) for variant in options["variants"]}
    missing = {}
    for variant, match in parsed.items():
        if match is None:
            raise ValueError(f"onnxruntime-genai has no variant {variant}: take int4g32, int4g128, int2g128, …")
        if not (folder / variant).exists():
            missing[variant] = int(match[1]), int(match[2])
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        _save_random(checkpoint, options["shape"])
        for variant, (bits, block) in missing.items():
            model = Path(scratch) / variant
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", model]
            command += ["-p", "int4", "-e", "cpu", "-c", f"{scratch}/cache"]
            command += ["--extra_options", f"block_size={block}", "accuracy_level=4"]
            builder = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
            if builder.returncode:
                reason = (builder.stderr.strip().splitlines() or [f"exit code {builder.returncode}"])[-1]
                raise RuntimeError(f"the model builder of onnxruntime-genai cannot make {variant} ({reason})")
            if bits == 2:
                _narrow(model)
            model.rename(folder / variant)
            shutil.rmtree(f"{scratch}/cache", ignore_errors=True)


def _save_random(path: Path, shape: Mapping[str, Any]) -> None:
    """Save a random checkpoint in float16, with a tokenizer of as many words as the vocabulary has."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    common = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["attention_heads"],
        "num_key_value_heads": shape["kv_heads"],
        "max_position_embeddings": shape["context_length"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if shape["family"] == "phi":
        share = shape["rotary_dim"] / shape["head_dim"]
        config: Any = transformers.PhiConfig(**common, partial_rotary_factor=share)
    else:
        config = transformers.LlamaConfig(**common, head_dim=shape["head_dim"])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(default)
    model.save_pretrained(path)
    words = {f"w{i}": i for i in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(
        path
    )


def _narrow(folder: Path) -> None:
    """Turn the 4-bit model in a folder into a 2-bit one of the same shape with random weights."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    random = np.random.default_rng(0)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            next(attribute for attribute in node.attribute if attribute.name == "bits").i = 2
            rows, blocks, size = weights[node.input[1]].dims
            codes = random.integers(0, 256, (rows, blocks, size // 2), dtype=np.uint8)
            weights[node.input[1]].CopyFrom(numpy_helper.from_array(codes, node.input[1]))
            if len(node.input) > 3 and node.input[3]:
                raise RuntimeError("the builder gave MatMulNBits zero points, which this conversion does not know")
    for file in folder.glob("model.onnx*"):
        file.unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
