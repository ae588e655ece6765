"""An output layer that is computed coarse to fine, held to its contract: `exporter/graph/logits.py`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pmpd.exporter.bundle.coarse import limits
from pmpd.exporter.graph.logits import BITPLANE_LOGITS
from pmpd.exporter.verify.agreement import Check, Figure
from pmpd.exporter.verify.probe import Node, Run
from pmpd.exporter.verify.rounding import round_activations
from pmpd.runtime import Bundle

__all__ = ["coarse_check", "coarse_node", "coarse_ratio"]

Floats = npt.NDArray[np.float32]

LIMIT_ERROR = "largest error of an unfinished logit, in units of its limit"
SLACK = 1e-4  # of a limit, which kernels make in float32


def coarse_node(nodes: tuple[Node, ...]) -> Node | None:
    """Return the output layer of a graph, if it is computed coarse to fine."""
    return next((node for node in nodes if node.op == BITPLANE_LOGITS), None)


def coarse_check(name: str, bundle: Bundle, node: Node, whole: Run, coarse: Run, *, accuracy: str) -> Check:
    """Compare a run with margin 0 with one without, over the same steps of one token each.

    Args:
        name: of the check.
        bundle: the bundle.
        node: its output layer.
        whole: the run that finished all logits.
        coarse: the one that finished those that can be the best.
        accuracy: of the kernels of both.
    """
    tensors = {tensor.name: tensor for tensor in bundle.manifest.tensors}
    basis, bound = (bundle.tensor(tensors[name]) for name in node.inputs[4:6])
    x = whole.values[node.inputs[0]].astype(np.float64)
    if accuracy == "int8":
        x = round_activations(x).values
    y, want = coarse.values[node.outputs[0]], whole.values[node.outputs[0]]
    ratio = coarse_ratio(y, want, limits(x, basis, bound))
    finished = float((y == want).mean())
    return Check(name=name, figures={LIMIT_ERROR: Figure(ratio, 1.0)}, note=f"{finished:.2%} of the logits finished")


@np.errstate(all="ignore")  # a wrong kernel may give anything
def coarse_ratio(y: Floats, want: Floats, limit: npt.NDArray[np.float64]) -> float:
    """Return the largest error of logits ``[T, V]`` that are not finished, in units of their limits ``[T, V]``.

    It is infinite where a row is not finished that can be the best, and where the best token is another one.
    """
    if not np.array_equal(y.argmax(axis=1), want.argmax(axis=1)):
        return math.inf
    unfinished = y != want
    ratio = np.abs(y - want.astype(np.float64)) / (limit * (1 + SLACK))
    best = want.max(axis=1, keepdims=True)
    can_win = y + limit * (1 - SLACK) >= best  # of an unfinished row, y is the coarse value
    if (unfinished & can_win).any() or np.isnan(ratio).any():
        return math.inf
    return float(ratio[unfinished].max(initial=0.0))
