"""What an export reads of a model, whatever its file format: a configuration, tensors one by one, a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import Source

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]


class Checkpoint(ABC):
    """A model on disk. `open_checkpoint` opens one; each file format is a subclass.

    Attributes:
        path: its folder or file, for messages.
        source: where it comes from, as a bundle says it.
        config: its configuration under the names of Hugging Face's `config.json`.
    """

    path: Path
    source: Source
    config: Mapping[str, Any]

    @abstractmethod
    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Return a floating-point tensor by its name in transformers.

        Raises:
            PmpdError: the checkpoint has no such tensor, its file is damaged, or it is not of the given `shape`.
        """

    @abstractmethod
    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there and whole, without the cost of reading it. Raises as `tensor`."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its weight files."""

    @property
    @abstractmethod
    def tensor_nbytes(self) -> int:
        """Bytes of all its tensors as `tensor` returns them."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells this checkpoint from another, as JSON-ready data."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Return transformers' tokenizer, None if the checkpoint has none.

        Raises:
            PmpdError: it is damaged, or of a kind that cannot be loaded.
        """

    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """Return its generation configuration, empty if it has none.

        Raises:
            PmpdError: it is damaged.
        """

    def describe(self) -> list[str]:
        """Return what a person should know of it before an export, in lines of the plan."""
        return []

    def _require_shape(self, name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if actual != expected:
            raise PmpdError(
                f"tensor {name!r} is {list(actual)} instead of {list(expected)}: {self.path} does not fit its config"
            )
