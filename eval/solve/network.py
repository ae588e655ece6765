"""The network of a learned schedule: its training, and its ONNX file (PMPD paper, Appendix A.1, Eq. 4 and 5).

A learned query attends to the keys of a prompt, averaged over heads; the values it gathers go through a layer norm and
one hidden layer with ReLU. What comes out are the logits of the choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pmpd.runtime.schedule.learned import SCHEDULER_KEY, SchedulerCard

__all__ = ["Network", "Prompt", "Training", "to_onnx", "train"]

OPSET, IR_VERSION = 18, 9
RATE, DECAY = 1e-3, 1e-2  # of AdamW
EPOCHS, PATIENCE = 600, 60  # passes over the training prompts, and without progress on the others
BATCH = 32


@dataclass(frozen=True)
class Prompt:
    """What a prompt left in a layer of the cache, ``[kv_heads, tokens, head_dim]`` each, and its label."""

    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    label: int


@dataclass(frozen=True)
class Training:
    """How a training went: cross-entropy in nats a prompt, of the training and the validation prompts.

    `prior` is the loss, on the validation prompts, of giving each label its share of the training prompts.
    """

    epochs: int
    training: float
    validation: float
    prior: float


class Network(nn.Module):
    """Eq. 4 and 5: logits of the choices by keys and values.

    Args:
        width: of a key and a value.
        choices: how many there are.
        hidden: width of the hidden layer.
    """

    def __init__(self, width: int, choices: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))  # the mean of all values, to begin with
        self.norm = nn.LayerNorm(width)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, choices)

    def forward(self, keys: torch.Tensor, values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, choices]`` of keys and values ``[B, T, width]``; `present` ``[B, T]`` marks tokens."""
        scores = (keys @ self.query / math.sqrt(keys.shape[-1])).masked_fill(~present, -torch.inf)
        gathered = (scores.softmax(-1)[:, None] @ values)[:, 0]
        logits: torch.Tensor = self.last(torch.relu(self.first(self.norm(gathered))))
        return logits

    def choose(self, prompt: Prompt, confidence: float) -> int:
        """Return the first choice that is good enough with a confidence, as `LearnedSchedule` does."""
        with torch.no_grad():
            likely = self(*_batch([prompt])[:3])[0].double().softmax(0).cumsum(0) >= confidence
        return int(likely.int().argmax()) if bool(likely.any()) else len(likely) - 1


def train(
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt],
    *,
    choices: int,
    hidden: int,
    seeds: Sequence[int],
) -> tuple[Network, Training]:
    """Train a network per seed; return the one that is best on the validation prompts.

    Each stops when the validation prompts have seen no progress for `PATIENCE` epochs, and is what it was at its best.
    The loss is cross-entropy, every prompt counts the same. The bias of the last layer begins with the shares of the
    labels, so a network that learns nothing from prompts gives these.

    Args:
        prompts: to learn from.
        validation: others, to stop by.
        choices: how many labels there are.
        hidden: width of the hidden layer.
        seeds: one or more.
    """
    counts = np.bincount([prompt.label for prompt in prompts], minlength=choices) + 0.5
    prior = torch.tensor(counts / counts.sum(), dtype=torch.float32).log()
    unknowing = -float(np.mean([float(prior[prompt.label]) for prompt in validation]))
    runs = [_train(prompts, validation, prior, hidden, seed) for seed in seeds]
    network, epochs, training, loss = min(runs, key=lambda run: run[3])
    return network, Training(epochs, training, loss, unknowing)


def _train(
    prompts: Sequence[Prompt], validation: Sequence[Prompt], prior: torch.Tensor, hidden: int, seed: int
) -> tuple[Network, int, float, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(prompts[0].keys.shape[-1], len(prior), hidden)
    with torch.no_grad():
        network.last.bias.copy_(prior)
        network.last.weight.mul_(0.1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    order = np.random.default_rng(seed)
    keys, values, present, labels = _batch(prompts)
    held_out = _batch(validation)
    best: tuple[float, int, float, dict[str, torch.Tensor]] | None = None
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        for part in np.array_split(order.permutation(len(prompts)), math.ceil(len(prompts) / BATCH)):
            loss = nn.functional.cross_entropy(network(keys[part], values[part], present[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(part)
        network.eval()
        with torch.no_grad():
            score = float(nn.functional.cross_entropy(network(*held_out[:3]), held_out[3]))
        if best is None or score < best[0]:
            best = (score, epoch, total / len(prompts), {k: v.clone() for k, v in network.state_dict().items()})
        elif epoch - best[1] >= PATIENCE:
            break
    assert best is not None
    network.load_state_dict(best[3])
    return network, best[1] + 1, best[2], best[0]


def _batch(prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys, values ``[B, T, width]``, which positions are tokens ``[B, T]``, and labels ``[B]``."""
    lengths = torch.tensor([prompt.keys.shape[1] for prompt in prompts])
    present = torch.arange(int(lengths.max()))[None] < lengths[:, None]

    def padded(arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        means = [torch.from_numpy(array.astype(np.float32).mean(0)) for array in arrays]
        return nn.utils.rnn.pad_sequence(means, batch_first=True)

    keys, values = padded([prompt.keys for prompt in prompts]), padded([prompt.values for prompt in prompts])
    return keys, values, present, torch.tensor([prompt.label for prompt in prompts])


def to_onnx(network: Network, card: SchedulerCard, *, heads: int, dtype: str) -> bytes:
    """Return the ONNX file of a network: keys and values ``[heads, tokens, width]`` in, logits ``[choices]`` out.

    Args:
        network: trained.
        card: what it was trained for; it goes into the metadata.
        heads: key and value heads of the model, which the file averages over.
        dtype: of the KV cache, ``float16`` or ``float32``.
    """
    width, choices = len(network.query), len(network.last.bias)
    query = network.query.detach().numpy()[:, None] / np.float32(math.sqrt(width))
    arrays = {
        "query": query,
        "axis": np.array([0], np.int64),
        "row": np.array([1, -1], np.int64),
        "flat": np.array([-1], np.int64),
        "norm_scale": network.norm.weight.detach().numpy(),
        "norm_bias": network.norm.bias.detach().numpy(),
        **{f"{name}_{part}": getattr(getattr(network, name), part).detach().numpy()
           for name in ("first", "last") for part in ("weight", "bias")},
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        *(node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT) for name in ("keys", "values")),
        *(node("ReduceMean", [f"{name}_float", "axis"], [f"{name}_mean"], keepdims=0) for name in ("keys", "values")),
        node("MatMul", ["keys_mean", "query"], ["column"]),
        node("Reshape", ["column", "row"], ["scores"]),
        node("Softmax", ["scores"], ["attention"], axis=1),
        node("MatMul", ["attention", "values_mean"], ["gathered"]),
        node(
            "LayerNormalization",
            ["gathered", "norm_scale", "norm_bias"],
            ["normal"],
            axis=-1,
            epsilon=network.norm.eps,
        ),
        node("Gemm", ["normal", "first_weight", "first_bias"], ["hidden"], transB=1),
        node("Relu", ["hidden"], ["active"]),
        node("Gemm", ["active", "last_weight", "last_bias"], ["logit_row"], transB=1),
        node("Reshape", ["logit_row", "flat"], ["logits"]),
    ]
    element = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[dtype]
    cache = [helper.make_tensor_value_info(name, element, [heads, "tokens", width]) for name in ("keys", "values")]
    graph = helper.make_graph(
        nodes,
        "scheduler",
        cache,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [choices])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="pmpd"
    )
    helper.set_model_props(model, {SCHEDULER_KEY: card.to_json()})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data
