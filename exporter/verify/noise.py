"""Noise of the size of a graph's rounding, where it rounds: how far its logits may be from exact ones.

The portable graphs round what attention reads to float16. Noise on the weights of norms alone is too little for models
whose query and key biases are many times their products (Qwen2.5: 100 and more): what float16 drops of such a sum is no
small part of the product. 8-bit kernels are off in every product by an amount that is known; noise on what the products
read is too little for models with a few very large activations, as it moves the result along those alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pmpd.exporter.graph.operators import BITPLANE_MATMUL, GROUP_QUERY_ATTENTION
from pmpd.exporter.verify.rounding import HALF_U, moved

__all__ = ["add_error_inputs", "add_noise_inputs", "portable_noise", "product_errors"]

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
        noise = _input(model, f"{qkv.name}.noise")
        product = ir.node("Mul", [qkv, noise])  # (1, S, W)
        product.outputs[0].name = f"{qkv.name}.noisy"
        model.graph.insert_before(node, product)
        node.replace_input_with(0, product.outputs[0])
        heads = node.attributes["num_heads"].as_int() + 2 * node.attributes["kv_num_heads"].as_int()
        widths[str(noise.name)] = heads * slots
    return widths


def add_error_inputs(model: ir.Model) -> dict[str, str]:
    """Add a new input to what each product makes, ``[1, S, N]``; zeros leave the graph as it was.

    Logits are left alone: who has them can add to them.

    Returns:
        The names of the inputs, by what the product makes.
    """
    names = {}
    for node in [node for node in model.graph if node.op_type == BITPLANE_MATMUL]:
        result = node.outputs[0]
        if result in model.graph.outputs:
            continue
        error = _input(model, f"{result.name}.error")
        total = ir.node("Add", [result, error])  # (1, S, N)
        total.outputs[0].name = f"{result.name}.off"
        result.replace_all_uses_with(total.outputs[0])
        total.replace_input_with(0, result)
        model.graph.insert_after(node, total)
        names[str(result.name)] = str(error.name)
    return names


def _input(model: ir.Model, name: str) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, None, None]))
    model.graph.inputs.append(value)
    return value


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


def product_errors(
    sizes: Mapping[str, npt.NDArray[np.float64]], widths: Mapping[str, int]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return random errors ``[T, N]`` of products, always the same.

    Args:
        sizes: their root mean square at each position, ``[T]``, by what the product makes.
        widths: N of each.
    """
    rng, reach = np.random.default_rng(0), math.sqrt(3)
    return {
        name: (reach * size[:, None] * rng.uniform(-1, 1, (len(size), widths[name]))).astype(np.float32)
        for name, size in sizes.items()
    }
