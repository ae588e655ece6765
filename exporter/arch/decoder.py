"""What all families share: the shape of a decoder and its network skeleton."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn import (
    Attention,
    BitplaneEmbedding,
    BitplaneLinear,
    Cache,
    EarlyRotation,
    Embedding,
    EmbeddingFactory,
    GatedMlp,
    HeadLayout,
    LayerNorm,
    Linear,
    LinearFactory,
    Mlp,
    Norm,
    Part,
    RMSNorm,
    RotaryTables,
    SplitLinear,
    TiedEmbedding,
)

__all__ = ["Body", "Decoder", "DecoderLayer", "DecoderShape", "Family"]


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
    for the next, so that additions can be fused into the norms. A family's subclass makes the parts; blocks may differ
    by their number.
    """

    input_layernorm: Norm
    self_attn: Attention
    post_attention_layernorm: Norm | None
    mlp: GatedMlp | Mlp

    @abstractmethod
    def __init__(self, family: Any, linear: LinearFactory, index: int) -> None:
        """Make block number `index` of a family, out of `linear` layers."""
        super().__init__()

    @property
    def tables(self) -> tuple[HeadLayout, ...]:
        """The head layouts whose cosines and sines it reads from its cache."""
        return self.self_attn.tables

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
        embedding: Embedding | BitplaneEmbedding | TiedEmbedding,
        layers: Sequence[DecoderLayer],
        norm_name: str,
        norm: Norm,
        *,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding_scale = embedding_scale
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(list(layers))
        setattr(self, norm_name, norm)
        self.last_norm_name = norm_name

    def forward(self, op: Any, input_ids: ir.Value, caches: Sequence[Cache]) -> tuple[ir.Value, list[ir.Value]]:
        """``input_ids [B, S]`` → normalized hidden states ``[B, S, H]`` and present keys and values in turn."""
        stream, block, presents = self.embed_tokens(op, input_ids), None, []
        if self.embedding_scale != 1.0:
            # Not folded into the table, which may be the output layer's too.
            stream = op.Mul(stream, self.embedding_scale)
        for layer, cache in zip(self.layers, caches, strict=True):
            stream, block, key, value = layer(op, stream, block, cache)
            presents += [key, value]
        normalized, _ = getattr(self, self.last_norm_name)(op, stream, block)
        return normalized, presents


class Decoder(nn.Module):
    """A whole network: what `onnx_model.build_graph` turns into a model.

    With a `softcap` c, logits are ``c tanh(x / c)``: never beyond c, and in the same order.
    """

    def __init__(
        self, shape: DecoderShape, body: Body, head: Linear | SplitLinear, *, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.softcap = softcap
        # The first table is `rotary`, others are `rotary_2` and so on.
        layouts = dict.fromkeys(layout for layer in body.layers for layout in layer.tables)
        self.layouts = {layout: f"rotary_{i}" if i > 1 else "rotary" for i, layout in enumerate(layouts, 1)}
        for layout, name in self.layouts.items():
            setattr(self, name, RotaryTables(layout, shape.context_length))
        self.rotates_early = any(isinstance(module, EarlyRotation) for module in body.modules())
        self.model = body
        self.head_proj = head

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        lengths: tuple[ir.Value, ir.Value, ir.Value | None],
        past: Sequence[ir.Value],
        *,
        last_only: bool,
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Return logits ``[B, S, V]`` (``[B, 1, V]`` if `last_only`) and the presents in the order of `past`."""
        rotary = {layout: getattr(self, name)(op) for layout, name in self.layouts.items()}
        caches = [Cache(key, value, *lengths, rotary) for key, value in zip(past[::2], past[1::2], strict=True)]
        hidden, presents = self.model(op, input_ids, caches)
        if last_only:
            hidden = op.Gather(hidden, [-1], axis=1)  # (B, 1, H)
        logits = self.head_proj(op, hidden)
        if self.softcap is not None:
            logits = op.Mul(op.Tanh(op.Div(logits, self.softcap)), self.softcap)
        return logits, presents


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
    embedding_scale: float = 1.0
    logits_softcap: float | None = None
    shape: DecoderShape
    norm_epsilon: float
    activation: str

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Family:
        """Read a checkpoint's `config.json`; raise PmpdError for what cannot be exported."""

    def describe(self) -> list[str]:
        """Return what a user should know of the export beside sizes, as lines of its plan."""
        return []

    def reference_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the `config.json` of the model that transformers has to compute as the graphs do.

        It is the checkpoint's but where transformers computes by the length of a text and the graphs do not.
        """
        return config

    def make_layer(self, linear: LinearFactory, index: int) -> DecoderLayer:
        """Make block number `index`."""
        return self.layer(self, linear, index)

    def make_last_norm(self) -> Norm:
        """Make the norm before the output layer."""
        return self.norm(self.shape.hidden_size, epsilon=self.norm_epsilon)

    def decoder(self, linear: LinearFactory, head: LinearFactory, embedding: EmbeddingFactory) -> Decoder:
        """Build the network with the given linear layers, output layer and embedding.

        A tied embedding that is quantized is stored once, as the output layer; any other has its own table.
        """
        shape = self.shape
        layers = [self.make_layer(linear, index) for index in range(shape.layers)]
        # A tied head reads the embedding's table from the checkpoint.
        name = "model.embed_tokens" if shape.tied_embeddings else "lm_head"
        head_proj = head([Part(name, shape.vocab_size)], shape.hidden_size, bias=self.head_bias)
        tied = shape.tied_embeddings and isinstance(head_proj, BitplaneLinear)
        table = TiedEmbedding(head_proj) if tied else embedding(shape.vocab_size, shape.hidden_size)
        body = Body(table, layers, self.last_norm, self.make_last_norm(), embedding_scale=self.embedding_scale)
        return Decoder(shape, body, head_proj, softcap=self.logits_softcap)
