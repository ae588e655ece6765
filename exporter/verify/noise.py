"""Noise of the size of the portable graphs' rounding, where they round: at what attention reads, in float16.

Noise on the weights of norms alone is too little for models whose query and key biases are many times their products
(Qwen2.5: 100 and more): what float16 drops of such a sum is no small part of the product.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pmpd.exporter.graph.operators import GROUP_QUERY_ATTENTION
from pmpd.exporter.verify.rounding import HALF_U, moved

__all__ = ["add_noise_inputs", "portable_noise"]

# The portable attention rounds to float16: by 2^-11 at most, by about half of that in the root mean square.
PORTABLE_ROUNDING = HALF_U / 2


def add_noise_inputs(model: ir.Model) -> dict[str, int]:
    """Multiply what each attention node reads, ``[1, S, W]``, by a new input; ones leave the graph as it was.

    Returns:
        The names of the inputs, and W of each.
    """
    widths = {}
    for node in [node for node in model.graph if node.op_type == GROUP_QUERY_ATTENTION]:
        qkv, past = node.inputs[:2]
        assert qkv is not None
        assert past is not None
        assert past.shape is not None
        slots = past.shape[3]  # of (1, kv_heads, capacity, slots)
        assert isinstance(slots, int)
        noise = ir.Value(
            name=f"{qkv.name}.noise", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, None, None])
        )
        product = ir.node("Mul", [qkv, noise])  # (1, S, W)
        product.outputs[0].name = f"{qkv.name}.noisy"
        model.graph.insert_before(node, product)
        node.replace_input_with(0, product.outputs[0])
        model.graph.inputs.append(noise)
        heads = node.attributes["num_heads"].as_int() + 2 * node.attributes["kv_num_heads"].as_int()
        widths[str(noise.name)] = heads * slots
    return widths


def portable_noise(
    norms: Mapping[str, npt.NDArray[np.float32]], widths: Mapping[str, int], tokens: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the noise that stands for the portable graphs' rounding of a text of some tokens.

    Args:
        norms: weights of norms by name; they are moved by as much.
        widths: as `add_noise_inputs` returns them.
        tokens: of the text.
    """
    ones = {name: np.ones((1, tokens, width), np.float32) for name, width in widths.items()}
    return moved({**norms, **ones}, PORTABLE_ROUNDING)
