"""A peer: llama.cpp through the low-level API of llama-cpp-python, on a random model of a given shape.

Stand-alone (see `serve`): needs llama-cpp-python, gguf and numpy. Timed as llama-bench does: the prompt in one batch,
then single tokens, random ones, without sampling; every other setting is the library's default.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["LlamaCpp", "load", "make"]

F16, F32 = "float16", "float32"
ARCHITECTURES = {"llama": "llama", "phi": "phi2"}


class LlamaCpp:
    """A GGUF model, loaded once, with a context for one sequence."""

    def __init__(self, path: Path, *, threads: int, positions: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        _silence(llama_cpp)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = positions, threads, threads
        params.n_batch = max(params.n_batch, positions)
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {path.name}: delete it, to have it made again")
        self.facts = {
            "version": f"llama-cpp-python {version('llama-cpp-python')}",
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
            "model_bytes": path.stat().st_size,
        }

    def run(self, *, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Time a prompt and single tokens after it, in seconds."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return {"prefill_seconds": self._decode(prompt), "seconds": [self._decode([token]) for token in tokens]}

    def _decode(self, ids: Sequence[int]) -> float:
        array = (self._api.llama_token * len(ids))(*ids)
        begin = time.perf_counter()
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(ids)))
        self._api.llama_synchronize(self._context)
        seconds = time.perf_counter() - begin
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")
        return seconds


def load(options: Mapping[str, Any]) -> LlamaCpp:
    """Load one variant of the model that `make` made."""
    return LlamaCpp(_file(options, options["variant"]), threads=options["threads"], positions=options["positions"])


def make(options: Mapping[str, Any]) -> None:
    """Make the missing variants: a random F16 model, and from it each quantized one, named as llama.cpp names them."""
    import llama_cpp

    _silence(llama_cpp)
    kinds = {variant: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}", None) for variant in options["variants"]}
    if unknown := [variant for variant, kind in kinds.items() if kind is None]:
        raise ValueError(f"llama.cpp has no quantization {unknown[0]}: take Q4_0, Q3_K_M, Q2_K, …")
    missing = {variant: kind for variant, kind in kinds.items() if not _file(options, variant).exists()}
    if not missing:
        return
    source = _file(options, "F16")
    kept = source.exists() or "F16" in kinds
    if not source.exists():
        draft = source.with_suffix(".partial")
        _write_random(draft, options["shape"])
        draft.rename(source)
    for variant, kind in missing.items():
        target = _file(options, variant)
        if target == source:
            continue
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = kind, options["threads"]
        draft = target.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(draft).encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantize to {variant}")
        draft.rename(target)
    if not kept:
        source.unlink()


def _silence(api: Any) -> None:
    """Turn off the log; the callback must outlive the library's use of it."""
    api.pmpd_log = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(api.pmpd_log, None)


def _file(options: Mapping[str, Any], variant: str) -> Path:
    return Path(options["folder"]) / f"{variant}.gguf"


def _tensors(shape: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and type of every tensor, rows first as in PyTorch."""
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    q, kv = shape["attention_heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    phi = shape["family"] == "phi"

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{name}.weight", (rows, columns), F16
        if phi:
            yield f"{name}.bias", (rows,), F32

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{name}.weight", (hidden,), F32
        if phi:
            yield f"{name}.bias", (hidden,), F32

    yield "token_embd.weight", (vocab, hidden), F16
    for i in range(shape["layers"]):
        yield from norm(f"blk.{i}.attn_norm")
        if phi:
            yield from linear(f"blk.{i}.attn_qkv", q + 2 * kv, hidden)
        else:
            for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                yield from linear(f"blk.{i}.{name}", rows, hidden)
            yield from norm(f"blk.{i}.ffn_norm")
            yield from linear(f"blk.{i}.ffn_gate", ffn, hidden)
        yield from linear(f"blk.{i}.attn_output", hidden, q)
        yield from linear(f"blk.{i}.ffn_up", ffn, hidden)
        yield from linear(f"blk.{i}.ffn_down", hidden, ffn)
    yield from norm("output_norm")
    yield from linear("output", vocab, hidden)


def _write_random(path: Path, shape: Mapping[str, Any]) -> None:
    """Write an F16 model with random weights and no vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[shape["family"]])
    writer.add_block_count(shape["layers"])
    writer.add_context_length(shape["context_length"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["attention_heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["rotary_dim"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    for name, size, dtype in _tensors(shape):
        count = int(np.prod(size)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, size, np.dtype(dtype), count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, size, dtype in _tensors(shape):
        unit = name.endswith("norm.weight")
        values = np.ones(size, F32) if unit else random.standard_normal(size, np.float32) * np.float32(0.02)
        writer.write_tensor_data(values.astype(dtype))
    writer.close()
