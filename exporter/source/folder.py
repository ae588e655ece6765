"""A folder of Hugging Face: `config.json`, safetensors and tokenizer files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import safetensors

from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.text_model import stored_names, text_config
from pmpd.runtime.errors import PmpdError, one_line
from pmpd.runtime.format.manifest import Source

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointFolder", "read_config", "read_json"]

log = logging.getLogger(__name__)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class CheckpointFolder(Checkpoint):
    """A checkpoint in a folder. Use `CheckpointFolder.open`.

    Attributes:
        path: the folder.
        source: as `Checkpoint` says.
        config: `config.json`, of a model that also reads images that of its text model.
        shards: in which file each tensor lies.
        names: what tensors are called there.
    """

    path: Path
    source: Source
    config: Mapping[str, Any]
    shards: Mapping[str, Path]
    names: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, *, name: str, revision: str | None = None) -> Self:
        """Open a folder; `name` is what a bundle calls the model.

        Raises:
            PmpdError: it has no config.json, no safetensors weights, or a broken index.
        """
        config = read_config(path)
        source = Source(model=name, revision=_revision(path, revision), license=_license(path))
        files = _find_tensors(path)
        names = stored_names(files)
        return cls(path, source, config, {name: files[stored] for name, stored in names.items()}, names)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Return a tensor in its stored type; it is mapped from the file, not copied. Raises as `Checkpoint.tensor`."""
        if name not in self.shards:
            raise PmpdError(f"{self.path} has no tensor {name!r}: the checkpoint does not fit its config.json")
        shard = self.shards[name]
        try:
            # Opened anew each time (0.3 ms): what an open file has mapped counts as this process's memory.
            tensor: torch.Tensor = _open_shard(shard).get_tensor(self.names[name])
        except safetensors.SafetensorError as error:
            raise PmpdError(
                f"tensor {name!r} cannot be read from {shard} ({error}): fetch the checkpoint again"
            ) from None
        if shape is not None:
            self._require_shape(name, tuple(tensor.shape), shape)
        if not tensor.is_floating_point():
            raise PmpdError(
                f"tensor {name!r} is {tensor.dtype}: give the floating-point checkpoint, not a quantized one"
            )
        return tensor

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor; mapping it reads nothing."""
        self.tensor(name, shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its weight files."""
        return sum(shard.stat().st_size for shard in set(self.shards.values()))

    @property
    def tensor_nbytes(self) -> int:
        """The same as `nbytes`: tensors are mapped from the files."""
        return self.nbytes

    def identity(self) -> dict[str, Any]:
        """Return its configuration, and sizes and dates of its files."""
        files = sorted(set(self.shards.values()))
        stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        return {"config": dict(self.config), "files": stats}

    def tokenizer(self) -> Any:
        """Return what transformers loads from the folder, None if it has no tokenizer files."""
        if not any((self.path / name).is_file() for name in _TOKENIZERS):
            return None
        from transformers import AutoTokenizer

        try:
            # Without the last option transformers may ask the terminal whether to run a repository's code.
            return AutoTokenizer.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises Exception itself
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PmpdError(
                f"{self.path} has a tokenizer that transformers cannot load ({reason:.200}): fetch the checkpoint "
                "again; tokenizer.model needs the packages sentencepiece and protobuf"
            ) from None

    def describe(self) -> list[str]:
        """Return that something is left out, if it is."""
        whole = any(name != stored for name, stored in self.names.items())
        return ["source    the text model alone: what reads images is left out"] if whole else []

    def generation_config(self) -> dict[str, Any]:
        """Return `generation_config.json`."""
        file = self.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}


def _find_tensors(path: Path) -> dict[str, Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise PmpdError(f"{index} has no weight_map from tensors to files: fetch the checkpoint again")
        shards = {name: path / file for name, file in names.items()}
        for shard in sorted(set(shards.values())):
            if not shard.is_file() or shard.parent != path:
                raise PmpdError(f"{shard} is missing: {index.name} lists it, fetch the checkpoint again")
        return shards
    files = sorted(path.glob("*.safetensors"))
    if not files:
        if binaries := sorted(path.glob("*.bin")):
            raise PmpdError(
                f"{path} has only {binaries[0].name}, which is a pickle and can run code: convert it once where you "
                'trust it, with python -c "from transformers import AutoModelForCausalLM as M; '
                "M.from_pretrained('FOLDER').save_pretrained('NEW')\", and copy the tokenizer files"
            )
        raise PmpdError(f"{path} has no *.safetensors weights: give a complete checkpoint")
    shards = {}
    for file in files:
        shards |= dict.fromkeys(_open_shard(file).keys(), file)
    return shards


def _open_shard(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise PmpdError(f"{file} cannot be read ({error}): fetch the checkpoint again") from None


def read_config(path: Path) -> Mapping[str, Any]:
    """Return a folder's `config.json`, of a model that also reads images that of its text model; or raise PmpdError."""
    if not (path / "config.json").is_file():
        if files := sorted(path.glob("*.gguf")):
            raise PmpdError(f"{path} has no config.json: give the GGUF file in it, such as {files[0]}")
        raise PmpdError(f"{path} has no config.json: give a Hugging Face checkpoint's folder")
    return text_config(read_json(path / "config.json"))


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint, or raise PmpdError."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise PmpdError(f"{file} is not valid JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(document, dict):
        raise PmpdError(f"{file} is not a JSON object: fetch the checkpoint again")
    return document


def _revision(path: Path, asked: str | None) -> str | None:
    """Return the commit of a hub snapshot (its folder's name), or what was asked for."""
    return path.name if path.parent.name == "snapshots" else asked


def _license(path: Path) -> str | None:
    """Return the licence that a model card's front matter names, several of them separated by commas."""
    from huggingface_hub import metadata_load

    card = path / "README.md"
    if not card.is_file():
        return None
    try:
        names = (metadata_load(card) or {}).get("license")
    except Exception as error:  # of the YAML reader, of decoding, of the hub's own checks
        log.warning("warning   no licence read from %s (%s)", card, one_line(error, 100))
        return None
    names = names if isinstance(names, list) else [names]
    return ", ".join(name for name in names if isinstance(name, str)) or None
