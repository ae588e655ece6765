"""Bundles of version 3: their manifest in terms of version 4, in which a precision may be a mix."""

from __future__ import annotations

from typing import Any

from pmpd.runtime.errors import BundleError

__all__ = ["upgrade"]


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a version-3 manifest, parsed and without ``format`` and ``version``, as one of version 4: it is one.

    Raises:
        BundleError: it has a precision with decimals, or the field of mixes.
    """
    if "mixes" in document:
        raise BundleError("bundle.json has the field 'mixes', which version 3 does not know: export again")
    precisions = document.get("precisions")
    if isinstance(precisions, list) and any(isinstance(precision, float) for precision in precisions):
        raise BundleError(f"bundle.json: precisions {precisions!s:.60} must be whole in version 3: export again")
    return document
