"""The F16 GGUF file that llama.cpp quantizes: random weights of a shape, a checkpoint's, or another GGUF's.

Stand-alone (see `serve`): needs gguf and numpy. Files have no vocabulary: contenders are given token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["describe", "write"]

F16, F32 = "float16", "float32"
SHAPES = {"llama": "llama", "phi": "phi2"}
# `model_type` of a checkpoint, and the architecture that llama.cpp computes it with.
CHECKPOINTS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# What a GGUF file says of itself and of its vocabulary, which a copy in F16 says anew or leaves out.
NOT_COPIED = ("GGUF.", "tokenizer.", "general.architecture", "general.file_type", "general.quantization_version")

# Name, shape with rows first as in PyTorch, and how to read it.
Source = tuple[str, tuple[int, ...], Callable[[], Any]]


def write(path: Path, options: Mapping[str, Any]) -> None:
    """Write the F16 model of ``options["weights"]``, a checkpoint folder or a GGUF file, or of ``options["shape"]``."""
    import gguf
    import numpy as np

    weights = options.get("weights")
    if weights is None:
        writer, sources = _from_shape(path, options["shape"])
    else:
        writer, sources = (_from_folder if Path(weights).is_dir() else _from_gguf)(path, Path(weights))
    vocab_size = next(size[0] for name, size, _ in sources if name == "token_embd.weight")
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    dtypes = [np.dtype(F16 if len(size) > 1 else F32) for _, size, _ in sources]
    for (name, size, _), dtype in zip(sources, dtypes, strict=True):
        writer.add_tensor_info(name, size, dtype, int(np.prod(size)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, _, read), dtype in zip(sources, dtypes, strict=True):
        writer.write_tensor_data(np.ascontiguousarray(read(), dtype))
    writer.close()


def describe(path: Path) -> dict[str, Any]:
    """Return what a decode step reads of a GGUF file: ``step_bytes``, ``cache_bytes`` per position, and ``vocab_size``.

    Every tensor is read whole but the embedding, of which a step reads one row unless it is the output layer too. The
    cache is float16, llama.cpp's default.
    """
    import gguf

    reader = gguf.GGUFReader(str(path))
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    vocab_size = next(int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    if "output.weight" in sizes:
        sizes["token_embd.weight"] //= vocab_size
    field = {name.partition(".")[2]: entry for name, entry in reader.fields.items()}
    heads, layers = field["attention.head_count_kv"].contents(), field["block_count"].contents()
    width = field["attention.key_length"].contents() + field["attention.value_length"].contents()
    return {
        "step_bytes": sum(sizes.values()),
        "cache_bytes": 2 * width * (sum(heads) if isinstance(heads, list) else heads * layers),
        "vocab_size": vocab_size,
    }


def _from_shape(path: Path, shape: Mapping[str, Any]) -> tuple[Any, list[Source]]:
    """Random weights, the same in each run."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), SHAPES[shape["family"]])
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
    random = np.random.default_rng(0)

    def reader(name: str, size: tuple[int, ...]) -> Callable[[], Any]:
        if name.endswith("norm.weight"):
            return lambda: np.ones(size, F32)
        return lambda: random.standard_normal(size, np.float32) * np.float32(0.02)

    return writer, [(name, size, reader(name, size)) for name, size in _tensors(shape)]


def _tensors(shape: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of a random model."""
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    q, kv = shape["attention_heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    phi = shape["family"] == "phi"

    def linear(name: str, rows: int, *columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, *columns)
        if phi:
            yield f"{name}.bias", (rows,)

    yield "token_embd.weight", (vocab, hidden)
    for i in range(shape["layers"]):
        yield from linear(f"blk.{i}.attn_norm", hidden)
        if phi:
            yield from linear(f"blk.{i}.attn_qkv", q + 2 * kv, hidden)
        else:
            for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                yield from linear(f"blk.{i}.{name}", rows, hidden)
            yield from linear(f"blk.{i}.ffn_norm", hidden)
            yield from linear(f"blk.{i}.ffn_gate", ffn, hidden)
        yield from linear(f"blk.{i}.attn_output", hidden, q)
        yield from linear(f"blk.{i}.ffn_up", ffn, hidden)
        yield from linear(f"blk.{i}.ffn_down", hidden, ffn)
    yield from linear("output_norm", hidden)
    yield from linear("output", vocab, hidden)


def _from_gguf(path: Path, source: Path) -> tuple[Any, list[Source]]:
    """The weights of a GGUF file of any type, dequantized."""
    import gguf

    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(path), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(NOT_COPIED) and not name.endswith(".vocab_size"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    config = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if "." in name}
    if "attention.key_length" not in config:
        _add_head_dim(writer, config["embedding_length"] // config["attention.head_count"])
    sources: list[Source] = []
    for tensor in reader.tensors:
        size = tuple(int(length) for length in reversed(tensor.shape))
        sources.append((tensor.name, size, partial(gguf.quants.dequantize, tensor.data, tensor.tensor_type)))
    return writer, sources


def _from_folder(path: Path, folder: Path) -> tuple[Any, list[Source]]:
    """The weights of a checkpoint folder with safetensors."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unlike = rope.get("rope_type", rope.get("type", "default"))
    if kind == "mistral" and config.get("sliding_window"):
        unlike = "a sliding window"
    if kind not in CHECKPOINTS or config.get("use_sliding_window") or unlike != "default":
        reason = f"family {kind!r}" if kind not in CHECKPOINTS else f"rope or window: {unlike}"
        raise ValueError(f"no GGUF is made of {folder.name} ({reason}): give one that llama.cpp's own converter made")
    architecture = CHECKPOINTS[kind]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 1e4))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_head_dim(writer, head_dim)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), layers)
    # llama.cpp turns neighbouring pairs of a head in this architecture, transformers the two halves.
    paired = {"q_proj": heads, "k_proj": kv_heads} if architecture == "llama" else {}
    sources: list[Source] = []
    for name, size, read in _safetensors(folder):
        if name.endswith("inv_freq") or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"llama.cpp has no place for {name} of {folder.name}: give a GGUF file")
        groups = paired.get(name.split(".")[-2])
        sources.append((target, size, partial(_interleave, read, groups) if groups else read))
    return writer, sources


def _add_head_dim(writer: Any, head_dim: int) -> None:
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _interleave(read: Callable[[], Any], heads: int) -> Any:
    """Read a tensor with the rows of each head reordered: 0, D/2, 1, D/2 + 1, …"""
    rows = read()
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, D/2, ...]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _safetensors(folder: Path) -> Iterator[Source]:
    """Yield the tensors of all safetensors files of a folder."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder.name} has no model*.safetensors: give another checkpoint, or a GGUF file")
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file.name}: {name} is {entry['dtype']}: only F32, F16 and BF16 are read")
            begin = 8 + length + entry["data_offsets"][0]
            size = tuple(entry["shape"])
            yield name, size, partial(_read, file, entry["dtype"], begin, size)


def _read(file: Path, dtype: str, begin: int, size: tuple[int, ...]) -> Any:
    import numpy as np

    values = np.memmap(file, DTYPES[dtype], "r", begin, size)
    # bfloat16 is the upper half of a float32.
    return (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values
