"""How much an error of each weight matters: squared gradients on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.runtime.errors import PmpdError

__all__ = ["Fisher", "squared_gradients"]


class Fisher:
    """The diagonal of the empirical Fisher information, as `squared_gradients` gives it: for a layer, ``[N, K]``."""

    name: ClassVar[str] = "fisher"

    def compute(
        self,
        model: torch.nn.Module,
        batches: Sequence[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.generic]], None],
        progress: Callable[..., Iterable[torch.Tensor]],
    ) -> None:
        """Write the squared gradients of each weight, in the weight's shape. Raises as `squared_gradients`."""
        sums = squared_gradients(model.float(), progress(batches, len(batches)), weights)
        for name in weights:
            write(name, sums.pop(name))

    def nbytes(self, weight: str, rows: int, columns: int) -> int:
        """Return what it takes on disk for a weight."""
        return 4 * rows * columns

    def select(
        self, layer: LinearLayer, part: int, array: npt.NDArray[np.generic]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Take the part's rows and columns: ``[n, K]``."""
        return {self.name: layer.select(part, array)}


def squared_gradients(
    model: torch.nn.Module,
    batches: Iterable[torch.Tensor],
    parameters: Collection[str],
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the diagonal of the empirical Fisher information of the named parameters.

    It is the squared gradient of the mean next-token loss of a sequence, summed over the sequences: the weight of each
    error in the clustering of SqueezeLLM (Kim et al., ICML 2024, Section 4.1) and Any-Precision LLM. Gradients are
    squared and freed one by one as backpropagation makes them, so that memory peaks at the model, the result and one
    gradient, plus the activations of one sequence. The model comes back as it was.

    Args:
        model: a causal language model of transformers, on any device.
        batches: token ids, int64 ``[B, T]`` with T >= 2, no padding.
        parameters: names as in `model.named_parameters`; either name of a tied parameter.

    Returns:
        Float32 arrays of the parameters' shapes.

    Raises:
        PmpdError: a parameter the model lacks, a sequence of fewer than two tokens, or a loss that is not finite.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in parameters:
        if name not in named:
            raise PmpdError(f"the model has no parameter {name!r}: names are those of model.named_parameters()")
    sums = {named[name]: torch.zeros_like(named[name], dtype=torch.float32) for name in parameters}

    def accumulate(parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            sums[parameter].addcmul_(gradient, gradient)
            parameter.grad = None

    training = model.training
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(parameter in sums)
    hooks = [
        parameter.register_post_accumulate_grad_hook(accumulate)  # type: ignore[no-untyped-call]
        for parameter in sums
    ]
    try:
        model.eval()
        sequences = (ids for batch in batches for ids in batch)
        for count, ids in enumerate(sequences, start=1):
            _next_token_loss(model, ids, count).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        model.train(training)
    return {name: sums[named[name]].cpu().numpy() for name in parameters}


def _next_token_loss(model: torch.nn.Module, ids: torch.Tensor, number: int) -> torch.Tensor:
    if len(ids) < 2:
        raise PmpdError(f"calibration sequence {number} has {len(ids)} tokens: a next-token loss needs at least 2")
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    loss = torch.nn.functional.cross_entropy(logits.float(), ids[1:])
    if not loss.isfinite():
        raise PmpdError(f"the loss of calibration sequence {number} is {loss.item()}: is the checkpoint damaged?")
    return loss
