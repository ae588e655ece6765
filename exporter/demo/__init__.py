"""The embedded demo model: a small story writer that needs no network, and the script that trains such a model."""

from __future__ import annotations

from pathlib import Path

__all__ = ["demo_model_path"]


def demo_model_path() -> Path:
    """Return the folder of the embedded demo model, a Hugging Face checkpoint (float16 safetensors)."""
    return Path(__file__).parent / "model"
