"""Bundles of version 2: their manifest in terms of version 3, which has everything that version 2 had."""

from __future__ import annotations

from typing import Any

from pmpd.runtime.errors import BundleError

__all__ = ["upgrade"]


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a version-2 manifest, parsed and without ``format`` and ``version``, as one of version 3: it is one.

    Raises:
        BundleError: it has a tensor of a role that version 2 does not know.
    """
    tensors = document.get("tensors")
    for tensor in tensors if isinstance(tensors, list) else ():
        if isinstance(tensor, dict) and tensor.get("role") in ("basis", "bound"):
            raise BundleError(
                f"bundle.json: tensor {tensor.get('name')!r:.60} has the role {tensor['role']!r}, which version 2 does "
                "not know: export again"
            )
    return document
