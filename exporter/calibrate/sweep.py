"""A float model over a text, block by block: what each linear layer is given, and the loss's gradients there.

First forward through the blocks, all of the text through one block after the other; then the loss; then back from the
last block to the first, each computed once more with gradients. So only one block's activations are in memory at a
time, beside what goes from block to block, which is `tokens * hidden size` numbers a block.

Where inputs alone are wanted, the way forward is all there is.

Blocks are called with what the model of transformers calls them with, which is recorded, so this knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from pmpd.runtime.errors import PmpdError

__all__ = ["Progress", "Visit", "VisitInputs", "fast_dtype", "of_dtype", "sweep", "sweep_inputs"]

# Takes a layer's name in the block, its inputs [B, T, K] and the gradients at its outputs [B, T, N], of a batch.
Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
# Takes a layer's name in the block and its inputs [B, T, K], of a batch.
VisitInputs = Callable[[str, torch.Tensor], None]
_Watch = Callable[[str, torch.Tensor, torch.Tensor], None]  # name, inputs and outputs
Progress = Callable[[Iterable[int], int], Iterable[int]]


def sweep(
    model: torch.nn.Module,
    batches: Sequence[torch.Tensor],
    visit: Callable[[int], Visit],
    *,
    dtype: torch.dtype,
    progress: Progress = lambda blocks, total: blocks,
) -> None:
    """Visit all linear layers of all blocks with what a text does there, from the last block to the first.

    The loss is the sum of the next-token losses, so a token's gradients do not depend on how long the text is.

    Args:
        model: a causal language model of transformers in float32, but for its blocks, in ``model.model.layers``, which
            may be of any type. It comes back as it was.
        batches: token ids, int64 ``[B, T]`` with T >= 2, no padding.
        visit: called with a block's number; returns what takes the layers of this block, batch by batch.
        dtype: of the blocks' arithmetic.
        progress: shows which blocks are done, of how many; they are gone through twice.

    Raises:
        PmpdError: batches of fewer than two tokens, or a loss that is not finite.
    """
    with _frozen(model):
        network = _Network(model)
        blocks = network.blocks
        runs = _runs(network, batches)
        for index in progress(range(len(blocks)), len(blocks)):
            with of_dtype(blocks[index], dtype), torch.no_grad():
                for run in runs:
                    run.forward(blocks[index], index, dtype)
        for number, run in enumerate(runs, 1):
            run.loss(network, number)
        for index in progress(reversed(range(len(blocks))), len(blocks)):
            with of_dtype(blocks[index], dtype), _watched(blocks[index], _with_gradients(visit(index))):
                for run in runs:
                    run.backward(blocks[index], index, dtype)


def sweep_inputs(
    model: torch.nn.Module,
    batches: Sequence[torch.Tensor],
    visit: Callable[[int], VisitInputs],
    *,
    dtype: torch.dtype,
    progress: Progress = lambda blocks, total: blocks,
) -> None:
    """Visit all linear layers of all blocks with what a text gives them, from the first block to the last.

    Arguments and errors as those of `sweep`, but that nothing is computed backwards.
    """
    with _frozen(model), torch.no_grad():
        network = _Network(model)
        blocks = network.blocks
        runs = _runs(network, batches)
        for index in progress(range(len(blocks)), len(blocks)):
            with of_dtype(blocks[index], dtype), _watched(blocks[index], _without_outputs(visit(index))):
                for run in runs:
                    run.forward(blocks[index], index, dtype)
                    del run.states[0]  # nobody comes back for it


class _StandIn(torch.nn.Module):
    """Takes a block's place: does something else with what the block is called with."""

    def __init__(self, block: torch.nn.Module, instead: Callable[..., torch.Tensor], *, in_tuple: bool) -> None:
        super().__init__()
        self.instead, self.in_tuple = instead, in_tuple
        if hasattr(block, "attention_type"):  # which mask a block gets may depend on it
            self.attention_type = block.attention_type

    def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor | tuple[torch.Tensor]:
        """Do it, and return the result as the block would."""
        result = self.instead(hidden, options)
        return (result,) if self.in_tuple else result


class _Network:
    """A model whose blocks can be replaced for a while.

    Attributes:
        blocks: the model's.
        in_tuple: whether blocks return their result in a tuple: architectures and versions of transformers differ.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.body = model, model.model
        self.blocks: list[torch.nn.Module] = list(model.model.layers)
        first, seen = self.blocks[0], list[bool]()
        hook = first.register_forward_hook(lambda *call: seen.append(isinstance(call[-1], tuple)))
        try:
            with torch.no_grad(), of_dtype(first, torch.float32), self._blocks_replaced([first]):
                self.body(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        finally:
            hook.remove()
        (self.in_tuple,) = seen

    def replaced(self, instead: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
        """Put a stand-in in the place of every block."""
        return self._blocks_replaced(_StandIn(block, instead, in_tuple=self.in_tuple) for block in self.blocks)

    @contextmanager
    def _blocks_replaced(self, blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
        layers = self.body.layers
        self.body.layers = torch.nn.ModuleList(blocks)
        try:
            yield
        finally:
            self.body.layers = layers


class _Run:
    """A batch on its way through the model.

    Attributes:
        ids: int64 ``[B, T]``; the last of each sequence is only predicted.
        states: what goes into blocks 0, 1, …, ``[B, T - 1, H]`` each.
        calls: with what each block is called.
        gradient: of the loss at the output of the last block that is not done yet.
    """

    def __init__(self, network: _Network, ids: torch.Tensor) -> None:
        self.ids = ids
        self.states: list[torch.Tensor] = []
        self.calls: list[Mapping[str, Any]] = []
        with torch.no_grad(), network.replaced(self._record):
            network.body(input_ids=ids[:, :-1], use_cache=False)
        del self.states[1:]

    def _record(self, hidden: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        self.states.append(hidden)
        self.calls.append(options)
        return hidden

    def forward(self, block: torch.nn.Module, index: int, dtype: torch.dtype) -> None:
        """Go through a block."""
        self.states.append(_call(block, self.states[-1], self.calls[index], dtype))

    def loss(self, network: _Network, number: int) -> None:
        """Set the gradient at the output of the last block."""
        last = self.states.pop().float().requires_grad_(True)
        self.gradient = torch.empty_like(last)
        for i, ids in enumerate(self.ids):  # one sequence after the other: logits are large
            with network.replaced(lambda *_, i=i: last[i : i + 1]):
                logits = network.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum")
            if not loss.isfinite():
                raise PmpdError(f"the loss of calibration batch {number} is {loss.item()}: is the checkpoint damaged?")
            (whole,) = torch.autograd.grad(loss, last)
            self.gradient[i] = whole[i]

    def backward(self, block: torch.nn.Module, index: int, dtype: torch.dtype) -> None:
        """Go back through a block."""
        x = self.states.pop().detach().to(dtype).requires_grad_(True)
        output = _call(block, x, self.calls[index], dtype)
        output.backward(self.gradient.to(dtype))  # type: ignore[no-untyped-call]
        assert x.grad is not None
        self.gradient = x.grad


def _runs(network: _Network, batches: Sequence[torch.Tensor]) -> list[_Run]:
    """Put each batch before the first block."""
    for number, ids in enumerate(batches, 1):
        if ids.shape[1] < 2:
            raise PmpdError(f"calibration batch {number} has sequences of one token: a next-token loss needs two")
    return [_Run(network, ids) for ids in batches]


def _call(block: torch.nn.Module, x: torch.Tensor, options: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return what a block hands to the next."""
    returned = block(x.to(dtype), **{name: _converted(option, dtype) for name, option in options.items()})
    output: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned  # some versions return more
    return output


def _converted(option: Any, dtype: torch.dtype) -> Any:
    """Convert what is a tensor of floats, or a tuple of them: rotary tables, masks."""
    if isinstance(option, tuple):
        return tuple(_converted(part, dtype) for part in option)
    return option.to(dtype) if isinstance(option, torch.Tensor) and option.is_floating_point() else option


def _without_outputs(visit: VisitInputs) -> _Watch:
    """Return what hands a layer's name and inputs on."""
    return lambda name, inputs, _: visit(name, inputs)


def _with_gradients(visit: Visit) -> _Watch:
    """Return what waits for the gradients at a layer's outputs, and hands them on with its inputs."""

    def watch(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: visit(name, inputs, gradient))  # type: ignore[no-untyped-call]

    return watch


@contextmanager
def _watched(block: torch.nn.Module, watch: _Watch) -> Iterator[None]:
    """Hand names, inputs and outputs of the block's linear layers to `watch` while the block runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: watch(name, inputs[0].detach(), output)

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                stack.callback(module.register_forward_hook(hook(name)).remove)
        yield


@contextmanager
def of_dtype(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Convert a module's weights for as long as it is needed."""
    kept = {parameter: parameter.data for parameter in module.parameters()}
    for parameter in kept:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where the processor computes with it, or float32."""
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Keep gradients away from weights, and dropout off."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    model.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        model.train(training)
