"""What `--model` may be: the demo model, an alias, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pmpd.exporter.demo import demo_model_path
from pmpd.runtime.errors import PmpdError, one_line, unknown_choice
from pmpd.tvm_kernels.models import MODELS, shipped_models

__all__ = ["DEMO", "published_name", "resolve_model", "shipped_models"]

DEMO = "demo"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"]


def resolve_model(model: str, *, revision: str | None = None, accept: Callable[[Path], object] | None = None) -> Path:
    """Return a model's local folder or GGUF file: ``demo``, a path, or a snapshot of an alias or hub id.

    The hub is asked only for what is not in its cache; `HF_HUB_OFFLINE=1` keeps it from asking at all. `accept` is
    given the snapshot of a hub model when its config.json alone is there, and may refuse it before weights are fetched.

    Raises:
        PmpdError: no such folder, alias or hub model, the hub cannot be reached, or `accept` raised it.
    """
    if model == DEMO:
        return demo_model_path()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise PmpdError(f"{path} is a file: give a GGUF file, or the folder of a Hugging Face checkpoint")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise PmpdError(
            f"there is no file or folder {path}: give the folder of a Hugging Face checkpoint, a GGUF file, or a hub id"
        )
    hub_id = MODELS[model].hub_id if model in MODELS else model
    if hub_id.count("/") != 1:
        raise PmpdError(
            f"{unknown_choice('model', model, [DEMO, *MODELS])}, or give a hub id (owner/name), a folder or a GGUF file"
        )
    if accept is not None:
        accept(_fetch(hub_id, revision, ["config.json"]))
    return _fetch(hub_id, revision, _HUB_FILES)


def _fetch(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch files of a hub model that are not in the cache, and return the folder of its snapshot."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PmpdError(
            f"{hub_id} cannot be fetched from the Hugging Face hub ({one_line(reason)}): "
            "check the name, your network and login, or give a local folder"
        ) from None


def published_name(model: str) -> str:
    """Return a model as a bundle names it: of a local one only the last part, which says nothing of its owner."""
    path = Path(model).expanduser()
    return path.resolve().name if model != DEMO and path.exists() else model
