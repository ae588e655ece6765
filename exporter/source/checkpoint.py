"""Reading a Hugging Face checkpoint: from the hub, an alias or a folder; tensor by tensor, never all at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import safetensors

from pmpd.exporter.demo import demo_model_path
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.manifest import Source

if TYPE_CHECKING:
    import torch

__all__ = ["ALIASES", "DEMO", "Checkpoint", "read_json", "resolve_model"]

ALIASES = {
    "phi-1": "microsoft/phi-1",
    "phi-1.5": "microsoft/phi-1_5",
    "phi-2": "microsoft/phi-2",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-13b": "lmsys/vicuna-13b-v1.5",
    "mobilellama-1.4b": "mtgv/MobileLLaMA-1.4B-Chat",
    "stablelm-zephyr-3b": "stabilityai/stablelm-zephyr-3b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "longchat-13b": "lmsys/longchat-13b-16k",
}
DEMO = "demo"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"]


def resolve_model(model: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a model: a folder as given, ``demo``, or a snapshot of an alias or hub id.

    The hub is asked only for what is not in its cache; `HF_HUB_OFFLINE=1` keeps it from asking at all.

    Raises:
        PmpdError: no such folder, alias or hub model, or the hub cannot be reached.
    """
    if model == DEMO:
        return demo_model_path()
    if Path(model).is_dir():
        return Path(model)
    hub_id = ALIASES.get(model, model)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise PmpdError(
            f"{unknown_choice('model', model, [DEMO, *ALIASES])}, or give a hub id (owner/name) or a folder"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PmpdError(
            f"{hub_id} cannot be fetched from the Hugging Face hub ({reason}): "
            "check the name, your network and login, or give a local folder"
        ) from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its configuration, and where each tensor lies."""

    path: Path
    source: Source
    config: Mapping[str, Any]
    shards: Mapping[str, Path]

    @classmethod
    def open(cls, model: str, *, revision: str | None = None) -> Self:
        """Open a model as `resolve_model` finds it.

        Raises:
            PmpdError: it is not found, has no config.json, no safetensors weights, or a broken index.
        """
        path = resolve_model(model, revision=revision)
        if not (path / "config.json").is_file():
            raise PmpdError(f"{path} has no config.json: give a Hugging Face checkpoint's folder")
        config = read_json(path / "config.json")
        source = Source(model=model, revision=_revision(path, revision), license=_license(path))
        return cls(path, source, config, _find_tensors(path))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Return a tensor in its stored type; it is mapped from the file, not copied.

        Raises:
            PmpdError: the checkpoint has no such tensor, its file is damaged, or it is not of the given `shape`.
        """
        if name not in self.shards:
            raise PmpdError(f"{self.path} has no tensor {name!r}: the checkpoint does not fit its config.json")
        shard = self.shards[name]
        try:
            # Opened anew each time (0.3 ms): what an open file has mapped counts as this process's memory.
            tensor: torch.Tensor = _open_shard(shard).get_tensor(name)
        except safetensors.SafetensorError as error:
            raise PmpdError(
                f"tensor {name!r} cannot be read from {shard} ({error}): fetch the checkpoint again"
            ) from None
        if shape is not None and tuple(tensor.shape) != shape:
            raise PmpdError(
                f"tensor {name!r} is {list(tensor.shape)} instead of {list(shape)}: "
                f"{self.path} does not fit its config.json"
            )
        if not tensor.is_floating_point():
            raise PmpdError(
                f"tensor {name!r} is {tensor.dtype}: give the floating-point checkpoint, not a quantized one"
            )
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its weight files."""
        return sum(shard.stat().st_size for shard in set(self.shards.values()))

    def identity(self) -> dict[str, Any]:
        """Return what tells this checkpoint from another: its configuration, and sizes and dates of its files."""
        files = sorted(set(self.shards.values()))
        stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        return {"config": dict(self.config), "files": stats}


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
    """Return the licence that a model card's front matter names."""
    card = path / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.partition(":")[2].strip() or None
    return None
