"""Components that the architecture families are made of. They never name a family."""

from pmpd.exporter.nn.attention import Attention, Cache, EarlyRotation
from pmpd.exporter.nn.embedding import BitplaneEmbedding, Embedding, EmbeddingFactory, TiedEmbedding
from pmpd.exporter.nn.head_norm import HeadNorm, JointRMSHeadNorm, OffsetRMSHeadNorm, RMSHeadNorm
from pmpd.exporter.nn.linear import (
    BitplaneLinear,
    BitplaneLogits,
    FloatLinear,
    Index,
    Linear,
    LinearFactory,
    Part,
    SplitLinear,
    Stored,
    apart,
    fused,
)
from pmpd.exporter.nn.mlp import ACTIVATIONS, GatedMlp, Mlp
from pmpd.exporter.nn.norm import LayerNorm, Norm, OffsetRMSNorm, RMSNorm
from pmpd.exporter.nn.rotary import (
    HeadLayout,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    PositionScale,
    RopeScaling,
    Rotary,
    RotaryTables,
    YarnScaling,
)

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "BitplaneEmbedding",
    "BitplaneLinear",
    "BitplaneLogits",
    "Cache",
    "EarlyRotation",
    "Embedding",
    "EmbeddingFactory",
    "FloatLinear",
    "GatedMlp",
    "HeadLayout",
    "HeadNorm",
    "Index",
    "JointRMSHeadNorm",
    "LayerNorm",
    "Linear",
    "LinearFactory",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Mlp",
    "Norm",
    "NtkScaling",
    "OffsetRMSHeadNorm",
    "OffsetRMSNorm",
    "Part",
    "PositionScale",
    "RMSHeadNorm",
    "RMSNorm",
    "RopeScaling",
    "Rotary",
    "RotaryTables",
    "SplitLinear",
    "Stored",
    "TiedEmbedding",
    "YarnScaling",
    "apart",
    "fused",
]
