"""What all families share: the shape of a decoder, its network skeleton, and how to read a configuration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn import (
    ACTIVATIONS,
    Attention,
    Cache,
    GatedMlp,
    HeadLayout,
    LayerNorm,
    LinearFactory,
    LinearScaling,
    Llama3Scaling,
    Mlp,
    Norm,
    Part,
    RMSNorm,
    Rotary,
    RotaryTables,
    Stored,
)
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = [
    "Body",
    "Decoder",
    "DecoderLayer",
    "DecoderShape",
    "Embedding",
    "Family",
    "read_activation",
    "read_number",
    "read_rotary",
    "read_shape",
]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The numbers every family has."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head: HeadLayout
    vocab_size: int
    context_length: int
    tied_embeddings: bool


class DecoderLayer(nn.Module):
    """One transformer block: attention, then an MLP behind a norm of its own; without that norm, both side by side.

    It takes the residual stream and what the block before has yet to add to it (None for the first), and returns both
    for the next, so that additions can be fused into the norms. A family's subclass makes the parts.
    """

    input_layernorm: Norm
    self_attn: Attention
    post_attention_layernorm: Norm | None
    mlp: GatedMlp | Mlp

    @abstractmethod
    def __init__(self, family: Any, linear: LinearFactory) -> None:
        """Make the block of a family, out of `linear` layers."""
        super().__init__()

    def forward(
        self, op: Any, stream: ir.Value, block: ir.Value | None, cache: Cache
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Return the stream and this block's output ``[B, S, H]``, and the present key and value."""
        x, stream = self.input_layernorm(op, stream, block)
        attended, key, value = self.self_attn(op, x, cache)
        if self.post_attention_layernorm is None:
            return stream, op.Add(attended, self.mlp(op, x)), key, value
        x, stream = self.post_attention_layernorm(op, stream, attended)
        return stream, self.mlp(op, x), key, value


class Body(nn.Module):
    """Embedding, blocks and the last norm, named as in the checkpoint (``model.…``)."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer],
        norm_name: str,
        norm: Norm,
        embedding_type: ir.DataType,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape, embedding_type)
        self.layers = nn.ModuleList(list(layers))
        setattr(self, norm_name, norm)
        self.last_norm_name = norm_name

    def forward(self, op: Any, input_ids: ir.Value, caches: Sequence[Cache]) -> tuple[ir.Value, list[ir.Value]]:
        """``input_ids [B, S]`` → normalized hidden states ``[B, S, H]`` and present keys and values in turn."""
        stream, block, presents = self.embed_tokens(op, input_ids), None, []
        for layer, cache in zip(self.layers, caches, strict=True):
            stream, block, key, value = layer(op, stream, block, cache)
            presents += [key, value]
        normalized, _ = getattr(self, self.last_norm_name)(op, stream, block)
        return normalized, presents


class Embedding(nn.Module):
    """Rows of a table in its stored type, as float32."""

    def __init__(self, shape: DecoderShape, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = Stored([shape.vocab_size, shape.hidden_size], dtype=dtype)

    def forward(self, op: Any, input_ids: ir.Value) -> ir.Value:
        """``[B, S] → [B, S, H]``."""
        return op.Cast(op.Gather(self.weight, input_ids), to=ir.DataType.FLOAT)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A whole network: what `graphs.build_graph` turns into a model."""

    def __init__(self, shape: DecoderShape, body: Body, head: LinearFactory, *, head_bias: bool) -> None:
        super().__init__()
        self.shape = shape
        self.rotary = RotaryTables(shape.head, shape.context_length)
        self.model = body
        # A tied head reads the embedding's table from the checkpoint.
        name = "model.embed_tokens" if shape.tied_embeddings else "lm_head"
        self.head_proj = head([Part(name, shape.vocab_size)], shape.hidden_size, bias=head_bias)

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        lengths: tuple[ir.Value, ir.Value],
        past: Sequence[ir.Value],
        *,
        last_only: bool,
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Return logits ``[B, S, V]`` (``[B, 1, V]`` if `last_only`) and the presents in the order of `past`."""
        cos, sin = self.rotary(op)
        caches = [Cache(key, value, *lengths, cos, sin) for key, value in zip(past[::2], past[1::2], strict=True)]
        hidden, presents = self.model(op, input_ids, caches)
        if last_only:
            hidden = op.Gather(hidden, [-1], axis=1)  # (B, 1, H)
        return self.head_proj(op, hidden), presents


class Family(ABC):
    """An architecture family: reads its own configuration and builds its own network.

    Subclasses are frozen dataclasses of what their networks need. `model_type` is the name in `config.json`, `layer`
    the family's block, `norm` the kind of its last norm, `last_norm` that norm's name in the checkpoint.
    """

    model_type: ClassVar[str]
    layer: ClassVar[type[DecoderLayer]]
    norm: ClassVar[type[LayerNorm | RMSNorm]]
    last_norm: ClassVar[str] = "norm"
    head_bias: ClassVar[bool] = False
    shape: DecoderShape
    norm_epsilon: float
    activation: str

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Family:
        """Read a checkpoint's `config.json`; raise PmpdError for what cannot be exported."""

    def decoder(self, linear: LinearFactory, head: LinearFactory, *, embedding_type: ir.DataType) -> Decoder:
        """Build the network with the given linear layers."""
        layers = [self.layer(self, linear) for _ in range(self.shape.layers)]
        norm = self.norm(self.shape.hidden_size, epsilon=self.norm_epsilon)
        body = Body(self.shape, layers, self.last_norm, norm, embedding_type)
        return Decoder(self.shape, body, head, head_bias=self.head_bias)


def read_shape(
    config: Mapping[str, Any], *, context_length: int | None, default_rotary_share: float = 1.0
) -> DecoderShape:
    """Read the numbers every family has; the rotated share of a head has a default of the family's own."""
    rope = _table(config, "rope_parameters")  # transformers 5 keeps the share there
    share = read_number({**config, **rope}, "partial_rotary_factor", default_rotary_share)

    def size(name: str, default: int | None = None) -> int:
        number = config[name] if default is None else config.get(name) or default
        if type(number) is not int or number < 1:
            raise PmpdError(f"config.json: {name} must be a whole number of 1 or more, got {number!r}: correct it")
        return number

    try:
        heads, hidden_size = size("num_attention_heads"), size("hidden_size")
        kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", hidden_size // heads or 1)
        if heads % kv_heads:
            raise PmpdError(f"config.json: {heads} attention heads cannot share {kv_heads} key and value heads")
        if share > 1:
            raise PmpdError(f"config.json: partial_rotary_factor must be above 0 and at most 1, got {share}")
        longest = size("max_position_embeddings")
        if context_length is not None and not 1 <= context_length <= longest:
            raise PmpdError(f"context length {context_length}: the model allows 1 to {longest}")
        return DecoderShape(
            layers=size("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head=HeadLayout(head_dim, read_rotary(config, int(head_dim * share))),
            vocab_size=size("vocab_size"),
            context_length=context_length or longest,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise PmpdError(f"config.json lacks {error}: is it a complete Hugging Face checkpoint?") from None


def read_rotary(config: Mapping[str, Any], dim: int) -> Rotary:
    """Read the rotary embedding, as transformers 4 (`rope_scaling`) and 5 (`rope_parameters`) write it."""
    scaling = _table(config, "rope_parameters") or _table(config, "rope_scaling")
    theta = read_number({**config, **scaling}, "rope_theta", 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    match kind:
        case "default":
            return Rotary(dim, theta)
        case "linear":
            return Rotary(dim, theta, LinearScaling(read_number(scaling, "factor")))
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            factor, low, high, original = (read_number(scaling, name) for name in names)
            return Rotary(dim, theta, Llama3Scaling(factor, low, high, int(original)))
    raise PmpdError(f"config.json: {unknown_choice('rope scaling', kind, ['default', 'linear', 'llama3'])}")


def read_number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Read a positive number; what is absent or null has the default, if there is one.

    Raises:
        KeyError: it is absent and has no default.
        PmpdError: it is something else.
    """
    number = config[name] if default is None else config.get(name) or default
    if type(number) not in (int, float) or not 0 < number < math.inf:
        raise PmpdError(f"config.json: {name} must be a number above 0, got {number!r}: correct it")
    return number


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise PmpdError(f"config.json: {name} must be an object, got {table!r}: correct it")
    return {key: value for key, value in table.items() if value is not None}


def read_activation(config: Mapping[str, Any], default: str) -> str:
    """Read `hidden_act`."""
    name = str(config.get("hidden_act", default))
    if name not in ACTIVATIONS:
        raise PmpdError(f"config.json: {unknown_choice('hidden_act', name, ACTIVATIONS)}")
    return name
