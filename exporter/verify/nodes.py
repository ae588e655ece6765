"""Every node of a graph against float64, from the inputs that the node itself had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pmpd.exporter.graph.logits import BITPLANE_LOGITS
from pmpd.exporter.graph.operators import BITPLANE_GATHER, BITPLANE_MATMUL
from pmpd.exporter.verify.attention import attention_error
from pmpd.exporter.verify.probe import Node, Run
from pmpd.exporter.verify.rounding import (
    LEAST,
    LEVELS,
    U,
    int8_product_bound,
    product_bound,
    round_activations,
    round_codebook,
)
from pmpd.runtime import Bundle
from pmpd.runtime.format.bitplanes import dequantize, group_size, unpack

__all__ = ["NodeErrors", "Subject", "node_errors"]

Doubles = npt.NDArray[np.float64]

# Outputs of a product that are recomputed, if it has more: the first and last ones, and random ones between. Kernels
# compute outputs in tiles of at most 64 and give threads many tiles each, so that what is wrong is wrong many times.
OUTPUTS = 256
ENDS = 64


@dataclass(frozen=True)
class Subject:
    """A run whose nodes are checked.

    Attributes:
        run: what its nodes had and made.
        accuracy: of its kernels; None for the portable graph.
    """

    run: Run
    accuracy: str | None


@dataclass
class NodeErrors:
    """The largest error of a run's nodes, in units of what rounding may do.

    Attributes:
        ratios: by node; more than 1 is not rounding.
        rounding: by what a product makes, what rounding to 8 bits changes there: the root mean square at each position,
            ``[T]``; empty for kernels that compute in floats.
    """

    ratios: dict[str, float]
    rounding: dict[str, Doubles] = field(default_factory=dict)

    def worst(self) -> tuple[str, float]:
        """Return the node with the largest error, and its ratio; NaN counts as the largest."""
        return max(self.ratios.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


@np.errstate(all="ignore")  # a wrong kernel may give anything
def node_errors(bundle: Bundle, nodes: Sequence[Node], subjects: Sequence[Subject]) -> list[NodeErrors]:
    """Return the errors of several runs of one graph; weights are decoded once for all of them."""
    tensors = {tensor.name: tensor for tensor in bundle.manifest.tensors}
    errors = [NodeErrors({}) for _ in subjects]
    for node in nodes:
        if node.op == BITPLANE_GATHER:
            stored = [bundle.tensor(tensors[name]) for name in node.inputs[1:3]]
            for subject, result in zip(subjects, errors, strict=True):
                result.ratios[node.name] = _rows_error(node, subject.run, *stored)
            continue
        if node.op not in (BITPLANE_MATMUL, BITPLANE_LOGITS):
            cos, sin = (np.asarray(bundle.tensor(tensors[name]), np.float64) for name in node.inputs[5:7])
            for subject, result in zip(subjects, errors, strict=True):
                result.ratios[node.name] = attention_error(
                    node, subject.run, cos, sin, portable=subject.accuracy is None
                )
            continue
        codebook = bundle.tensor(tensors[node.inputs[2]])
        bits = codebook.shape[2].bit_length() - 1
        bias_name = node.inputs[7 if node.op == BITPLANE_LOGITS else 3]
        bias = bundle.tensor(tensors[bias_name]) if bias_name else None
        planes = tensors[node.inputs[1]]
        layer = _Layer.sampled(bundle.tensor(planes, planes=bits), codebook, bias, int(node.attributes["K"]))
        y = [subject.run.values[node.outputs[0]][:, layer.outputs].astype(np.float64) for subject in subjects]
        x = [subject.run.values[node.inputs[0]].astype(np.float64) for subject in subjects]
        ends = np.cumsum([len(rows) for rows in x])[:-1]
        exact, bound = (np.split(array, ends) for array in layer.product(np.concatenate(x)))
        for i, (subject, result) in enumerate(zip(subjects, errors, strict=True)):
            ratio = _ratio(y[i], exact[i], bound[i])
            if subject.accuracy == "int8" and not layer.grouped:
                result.rounding[node.outputs[0]], ratio = layer.int8(x[i], y[i], exact[i], ratio)
            result.ratios[node.name] = ratio
    return errors


@dataclass(frozen=True)
class _Layer:
    """Sampled outputs of a product: their codes ``[n, K]`` with the groups' offsets, codebooks, biases."""

    outputs: npt.NDArray[np.intp]
    index: npt.NDArray[np.intp]
    codebook: npt.NDArray[np.float16]
    bias: Doubles

    @classmethod
    def sampled(
        cls,
        planes: npt.NDArray[np.uint8],
        codebook: npt.NDArray[np.float16],
        bias: npt.NDArray[np.float32] | None,
        K: int,
    ) -> _Layer:
        outputs = _sample(len(codebook))
        _, G, levels = codebook.shape
        groups = np.arange(K) // group_size(K, G)
        index = unpack(planes[:, outputs], K) + (groups * levels).astype(np.intp)  # (n, K)
        return cls(
            outputs,
            index,
            codebook[outputs],
            np.zeros(len(outputs)) if bias is None else np.asarray(bias[outputs], np.float64),
        )

    @property
    def grouped(self) -> bool:
        """Whether a row has several codebooks, for which there are no 8-bit kernels."""
        groups: int = self.codebook.shape[1]
        return groups > 1

    def weights(self, values: Doubles) -> Doubles:
        """Return the weights ``[n, K]`` under codebook values ``[n, G, 2^p]``."""
        return np.take_along_axis(values.reshape(len(values), -1), self.index, axis=1)

    def product(self, x: Doubles) -> tuple[Doubles, Doubles]:
        """Return y ``[T, n]`` for x ``[T, K]``, and how far floats may be from it."""
        weights = self.weights(self.codebook.astype(np.float64))
        y = x @ weights.T + self.bias
        return y, product_bound(x.shape[1], np.linalg.norm(x, axis=1), np.linalg.norm(weights, axis=1), y)

    def int8(self, x: Doubles, y: Doubles, exact: Doubles, ratio: float) -> tuple[Doubles, float]:
        """Return what 8 bits change at each position ``[T]``, and the error of y in units of its bound.

        `ratio` is the error of y as a product in floats: a precision without 8-bit kernel is computed in them.
        """
        rounded, change = round_activations(x), np.zeros(len(x))
        for levels in LEVELS:
            codebook = round_codebook(self.codebook, levels)
            product = rounded.values @ self.weights(codebook.values).T + self.bias
            change = np.sqrt(np.square(product - exact).mean(axis=1))
            ratio = min(ratio, _ratio(y, product, int8_product_bound(x.shape[1], rounded, codebook, product)))
            if ratio <= 1:
                break
        return change, ratio


def _rows_error(node: Node, run: Run, planes: npt.NDArray[np.uint8], codebook: npt.NDArray[np.float16]) -> float:
    """Return the largest error of rows of an embedding, which are numbers of their codebooks: 1 is half a unit."""
    ids = run.values[node.inputs[0]].astype(np.intp)  # (T)
    rows = dequantize(planes[:, ids], codebook[ids], int(node.attributes["K"])).astype(np.float64)  # (T, K)
    return _ratio(run.values[node.outputs[0]].astype(np.float64), rows, U * np.abs(rows) + LEAST)


def _ratio(y: Doubles, product: Doubles, bound: Doubles) -> float:
    """Return the largest error in units of its bound; NaN where there is one."""
    return float((np.abs(y - product) / bound).max())


def _sample(outputs: int) -> npt.NDArray[np.intp]:
    """Return which of a product's outputs are recomputed, in order."""
    if outputs <= OUTPUTS:
        return np.arange(outputs)
    middle = np.random.default_rng(outputs).choice(outputs - 2 * ENDS, OUTPUTS - 2 * ENDS, replace=False) + ENDS
    return np.concatenate([np.arange(ENDS), np.sort(middle), np.arange(outputs - ENDS, outputs)])
