"""A model of transformers that computes with codes and codebooks, which can be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["Codebooks", "Coded", "Student"]

Coded = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]
"""Codes ``[N, K]`` of p bits and the codebook ``[N, G, 2**p]`` of a layer."""

Codebooks = dict[str, npt.NDArray[np.float16]]
"""By the name of their layer, ``[N, G, 2**p]``."""


class Student:
    """A model whose linear layers are first the checkpoint's, then what codes stand for.

    Products are computed in one type, all else in float32. In memory are the weights as they are stored, or a byte for
    each of them, and the activations of what runs.

    Args:
        model: a causal language model of transformers, its blocks as stored. It belongs to the student from now on.
        dtype: of products.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model.requires_grad_(False).eval(), dtype
        self._layers: dict[str, tuple[LinearLayer, list[_CodedLinear]]] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                self._replace(name, _StoredLinear(module, dtype))
        for parameter in model.parameters():
            parameter.data = parameter.data.float()

    def load(self, layers: Mapping[str, tuple[LinearLayer, Coded]]) -> None:
        """Compute with codes from now on, of layers by their names. Layers that are not among them stay."""
        # Where codes become indices: fresh memory for each product would take longer than the product.
        scratch = torch.empty(max(codes.size for _, (codes, _) in layers.values()), dtype=torch.int64)
        for name, (layer, (codes, book)) in layers.items():
            parts = []
            for part, weight in enumerate(layer.weight_names):
                module = weight.removesuffix(".weight")
                (rows, columns), scale = layer.places(part), layer.module.parts[part].scale
                groups = np.arange(codes.shape[1]) // group_size(codes.shape[1], book.shape[1])
                coded = _CodedLinear(
                    np.ascontiguousarray(codes[rows][:, columns]),
                    groups[columns],
                    book[rows].astype(np.float32) / np.float32(scale),
                    self.model.get_submodule(module).bias,
                    self.dtype,
                    scratch,
                )
                self._replace(module, coded)
                parts.append(coded)
            self._layers[name] = layer, parts

    @property
    def books(self) -> list[torch.nn.Parameter]:
        """The codebooks that are computed with, ``[n, G 2**p]``: can be learned."""
        return [part.book for _, parts in self._layers.values() for part in parts]

    def codebooks(self, before: Mapping[str, Coded]) -> Codebooks:
        """Return the codebooks as they are now; of rows that no weight of the checkpoint has, those from before."""
        result = {}
        for name, (layer, parts) in self._layers.items():
            result[name] = before[name][1].copy()
            for number, part in enumerate(parts):
                rows, _ = layer.places(number)
                book = part.book.detach().numpy() * np.float32(layer.module.parts[number].scale)
                result[name][rows] = book.reshape(len(book), *result[name].shape[1:])
        return result

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the output layer is given of tokens ``[B, T]``: ``[B, T, H]``."""
        states: torch.Tensor = self.model.model(input_ids=ids, use_cache=False)[0]
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits that follow from what the output layer is given: float32 ``[B, T, V]``."""
        with self._given(hidden):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits.float()
        return logits

    @contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[None]:
        body = self.model.model
        self.model.model = _Given(hidden)
        try:
            yield
        finally:
            self.model.model = body

    def _replace(self, name: str, module: torch.nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


class _Given(torch.nn.Module):
    """Takes a model's body's place: returns hidden states that are known already."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, **_: Any) -> Any:
        """Return them as the body would."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


class _StoredLinear(torch.nn.Module):
    """A linear layer whose weight stays in the type that it is stored in."""

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = layer.weight.data, dtype  # no parameter, so that it stays as it is
        bias: torch.Tensor | None = layer.bias
        self.bias = None if bias is None else bias.data.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``[..., K]``."""
        y = linear(x.to(self.dtype), self.weight.to(self.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class _CodedLinear(torch.nn.Module):
    """A linear layer whose weight is what codes ``[N, K]`` stand for; its codebook ``[N, G, L]`` can be learned."""

    def __init__(
        self,
        codes: npt.NDArray[np.uint8],
        groups: npt.NDArray[np.intp],
        book: npt.NDArray[np.float32],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        scratch: torch.Tensor,
    ) -> None:
        super().__init__()
        rows, count, levels = book.shape
        self.codes = torch.from_numpy(codes)
        self.scratch = scratch[: codes.size].view(codes.shape)
        self.first = torch.from_numpy(groups * levels) if count > 1 else None  # of each column's group
        self.book = torch.nn.Parameter(torch.from_numpy(book.reshape(rows, count * levels)))
        self.bias, self.dtype = bias, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``[..., K]``."""
        y: torch.Tensor = _Product.apply(x, self.book, self._places, self.dtype)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _places(self) -> torch.Tensor:
        """Return where in its row's codebook each weight's value is, until any layer is asked for its own."""
        places = self.scratch.copy_(self.codes)
        return places if self.first is None else places.add_(self.first)


class _Product(torch.autograd.Function):
    """A product with what codes stand for, which is computed once more on the way back instead of kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        x, book, places, dtype = inputs
        ctx.save_for_backward(x, book)
        ctx.places, ctx.dtype = places, dtype
        product: torch.Tensor = linear(x.to(dtype), book.gather(1, places()).to(dtype)).to(x.dtype)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x, book), places = ctx.saved_tensors, ctx.places()
        gradient = gradients[0].to(ctx.dtype)
        of_inputs = (gradient @ book.gather(1, places).to(ctx.dtype)).to(x.dtype)
        of_weight = gradient.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)
        of_book = torch.zeros_like(book).scatter_add_(1, places, of_weight.to(book.dtype))
        return of_inputs, of_book, None, None
