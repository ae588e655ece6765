"""Bundles of version 1: their manifest in terms of version 2, which says what names and data types only implied."""

from __future__ import annotations

from typing import Any

from pmpd.runtime.errors import BundleError

__all__ = ["upgrade"]

_NEW_FIELDS = ("schedules", "default_schedule", "verified")
_NEW_TENSOR_FIELDS = ("role", "layer", "bits")


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a version-1 manifest, parsed and without ``format`` and ``version``, as one of version 2.

    What version 1 left unsaid held for all of its bundles: activations are float32, graphs run on the CPU, an exported
    bundle was verified, and a tensor's role follows from its name. Fields that are missing or mistyped stay so, for the
    reader of version 2 to name.

    Raises:
        BundleError: it has a field that version 1 does not.
    """
    _refuse_fields(document, _NEW_FIELDS, "bundle.json")
    upgraded = document | {"verified": bool(document.get("verification"))}
    if "schedule" in upgraded:
        upgraded |= {"schedules": {"default": upgraded.pop("schedule")}, "default_schedule": "default"}
    if isinstance(tensors := document.get("tensors"), list):
        names = {str(tensor.get("name")) for tensor in tensors if isinstance(tensor, dict)}
        upgraded["tensors"] = [_with_role(tensor, names) for tensor in tensors]
    return upgraded


def _with_role(tensor: Any, names: set[str]) -> Any:
    if not isinstance(tensor, dict) or not isinstance(name := tensor.get("name"), str):
        return tensor
    _refuse_fields(tensor, _NEW_TENSOR_FIELDS, f"bundle.json: tensor {name!r:.60}")
    layer, codebook, bits = name.rpartition(".codebook.")
    if codebook and bits.isdecimal() and len(bits) == 1:
        return tensor | {"role": "codebook", "layer": layer, "bits": int(bits)}
    if name.endswith(".planes"):
        shape = tensor.get("shape")
        planes = shape[0] if isinstance(shape, list) and shape else None
        return tensor | {"role": "planes", "layer": name.removesuffix(".planes"), "bits": planes}
    layer = name.removesuffix(".bias")
    if layer != name and f"{layer}.planes" in names:  # norms have a bias too
        return tensor | {"role": "bias", "layer": layer}
    if name in ("rotary.cos", "rotary.sin"):
        return tensor | {"role": "rotary"}
    return tensor | {"role": "embedding" if name == "model.embed_tokens.weight" else "norm"}


def _refuse_fields(document: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if name in document:
            raise BundleError(f"{where} has the field {name!r}, which version 1 does not know: export again")
