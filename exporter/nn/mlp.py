"""Feed-forward blocks and their activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import LinearFactory, Part

__all__ = ["ACTIVATIONS", "GatedMlp", "Mlp"]


def _silu(op: Any, x: ir.Value) -> ir.Value:
    return op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")  # type: ignore[no-any-return]  # x * sigmoid(1.0 * x)


def _gelu(op: Any, x: ir.Value) -> ir.Value:
    return op.Gelu(x)  # type: ignore[no-any-return]


def _gelu_tanh(op: Any, x: ir.Value) -> ir.Value:
    return op.Gelu(x, approximate="tanh")  # type: ignore[no-any-return]


def _relu(op: Any, x: ir.Value) -> ir.Value:
    return op.Relu(x)  # type: ignore[no-any-return]


# By the names that checkpoints use for `hidden_act`.
ACTIVATIONS: dict[str, Callable[[Any, ir.Value], ir.Value]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))``, gate and up merged (Llama, StableLM); the result times `output_scale`."""

    def __init__(
        self,
        hidden_size: int,
        size: int,
        linear: LinearFactory,
        *,
        activation: str,
        bias: bool,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up_proj = linear([Part("gate_proj", size), Part("up_proj", size)], hidden_size, bias=bias)
        self.down_proj = linear([Part("down_proj", hidden_size, scale=output_scale)], size, bias=bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """``[B, S, H] → [B, S, H]``."""
        gate, up = op.Split(self.gate_up_proj(op, x), num_outputs=2, axis=-1, _outputs=2)  # (B, S, size) each
        return self.down_proj(op, op.Mul(self.activation(op, gate), up))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` (Phi)."""

    def __init__(self, hidden_size: int, size: int, linear: LinearFactory, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1_proj = linear([Part("fc1", size)], hidden_size, bias=bias)
        self.fc2_proj = linear([Part("fc2", hidden_size)], size, bias=bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """``[B, S, H] → [B, S, H]``."""
        return self.fc2_proj(op, self.activation(op, self.fc1_proj(op, x)))  # type: ignore[no-any-return]
