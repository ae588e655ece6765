"""A peer: onnxruntime-genai on the CPU, on a model that its own builder makes of given weights or random ones.

Stand-alone (see `serve`): needs onnxruntime-genai, onnxruntime and numpy; to make models also torch, transformers, onnx
and onnx-ir. Variants are ``int4g32``, ``int4g128``, ``int2g128``, …: bits, and columns that share a scale. The builder
knows no 2 bits: those models are its 4-bit graphs with every ``MatMulNBits`` set to 2 bits and given random weights.
"""

from __future__ import annotations

import json
import os
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
            **json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8")),
        }

    def run(self, *, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Time a prompt and as many greedy tokens after it as `tokens` are given, in seconds."""
        generator = self._generator()
        prefill = _timed(generator.append_tokens, list(prompt))
        generator.generate_next_token()  # chooses from the prompt's logits; the model runs in the next call
        return {"prefill_seconds": prefill, "seconds": [_timed(generator.generate_next_token) for _ in tokens]}

    def logits(self, *, prompt: Sequence[int], answer: Sequence[int]) -> Any:
        """Return the logits ``[n - 1, V]`` after each token of `answer` but the last, all computed in one batch."""
        generator = self._generator()
        generator.append_tokens([*prompt, *answer[:-1]])
        return generator.get_output("logits")[0, len(prompt) :]

    def _generator(self) -> Any:
        params = self._api.GeneratorParams(self._model)
        limit = self._positions + 1  # the last token it chooses needs no place in the cache, but counts
        params.set_search_options(max_length=limit, min_length=limit, do_sample=False)
        return self._api.Generator(self._model, params)


def _timed(call: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def load(options: Mapping[str, Any]) -> Genai:
    """Load one variant of the model that `make` made."""
    folder = Path(options["folder"]) / options["variant"]
    return Genai(folder, threads=options["threads"], positions=options["positions"])


def make(options: Mapping[str, Any]) -> None:
    """Make the missing variants of a checkpoint, the given one or a random one.

    Beside each folder lies a file with what a step reads of it.
    """
    folder = Path(options["folder"])
    parsed = {variant: re.fullmatch(r"int([24])g(16|32|64|128|256)", variant) for variant in options["variants"]}
    weights = options.get("weights")
    missing = {}
    for variant, match in parsed.items():
        if match is None:
            raise ValueError(f"onnxruntime-genai has no variant {variant}: take int4g32, int4g128, int2g128, …")
        if weights and match[1] == "2":
            raise ValueError(
                f"the builder of onnxruntime-genai makes no 2-bit model of real weights: leave {variant} out"
            )
        if weights and not Path(weights).is_dir():
            raise ValueError(f"the builder of onnxruntime-genai needs a checkpoint folder, and {weights} is none")
        if not (folder / variant).exists():
            missing[variant] = int(match[1]), int(match[2])
    if missing:
        _build(missing, options)
    for variant in parsed:
        notes = folder / f"{variant}.json"
        if not notes.exists():
            notes.write_text(json.dumps(_describe(folder / variant / "model.onnx")), encoding="utf-8")


def _build(missing: Mapping[str, tuple[int, int]], options: Mapping[str, Any]) -> None:
    """Let the builder make variants of so many bits and columns to a scale."""
    folder, weights = Path(options["folder"]), options.get("weights")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
        checkpoint = Path(weights) if weights else Path(scratch) / "checkpoint"
        if not weights:
            _save_random(checkpoint, options["shape"])
        for variant, (bits, block) in missing.items():
            model = Path(scratch) / variant
            command: list[str | Path] = [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                checkpoint,
                "-o",
                model,
            ]
            command += ["-p", "int4", "-e", "cpu", "-c", f"{scratch}/cache"]
            command += ["--extra_options", f"block_size={block}", "accuracy_level=4"]
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            builder = subprocess.run(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, env=offline
            )
            if builder.returncode:
                reason = (builder.stderr.strip().splitlines() or [f"exit code {builder.returncode}"])[-1]
                raise RuntimeError(f"the model builder of onnxruntime-genai cannot make {variant} ({reason})")
            if bits == 2:
                _narrow(model)
            model.rename(folder / variant)
            shutil.rmtree(f"{scratch}/cache", ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    """Return what a decode step reads of a model: ``step_bytes``, ``cache_bytes`` per position, and ``vocab_size``.

    Every weight is read whole but those that are only looked up: of the embedding and the rotary tables a row.
    """
    import numpy as np
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shares: dict[str, float] = {}
    for node in graph.node:
        for name in node.input:
            if name in weights:
                looked_up = node.op_type.startswith("Gather") or re.search(r"(cos|sin)_cache", name)
                share = 1 / max(weights[name].dims[0], 1) if looked_up and weights[name].dims else 1.0
                shares[name] = max(share, shares.get(name, 0.0))

    def size(tensor: Any) -> int:
        return int(np.prod(tensor.dims, dtype=np.int64)) * item_size(tensor.data_type)

    def item_size(kind: int) -> int:
        return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)

    decoder = json.loads(path.with_name("genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    heads = decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
    keys = next(value for value in graph.input if value.name.startswith("past_key_values."))
    logits = next(value for value in graph.output if value.name == "logits")
    return {
        "step_bytes": round(sum(size(weights[name]) * share for name, share in shares.items())),
        "cache_bytes": 2 * heads * decoder["head_size"] * item_size(keys.type.tensor_type.elem_type),
        "vocab_size": logits.type.tensor_type.shape.dim[-1].dim_value,
    }


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
