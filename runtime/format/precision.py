"""Precisions: how many bits of each weight are read.

A whole number says how many planes are read of every nested layer. One with decimals names a mix: layers are read at
different numbers of planes, and the number is what the mean of them stays within (README.md of this folder).

A whole precision is always an int and a mix a float, so that both print and compare as users write them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from pmpd.runtime.errors import BundleError, PmpdError, one_line
from pmpd.runtime.format.bitplanes import MAX_PRECISION
from pmpd.runtime.format.tensor import Tensor

__all__ = [
    "LARGEST_GAP",
    "PRECISION",
    "check_mixes",
    "describe_mix",
    "is_precision",
    "mean_planes",
    "parse_precision",
    "planes_read",
]

PRECISION = r"[0-9]{1,9}(?:\.[0-9]{1,2})?"
"""A precision as users write it, for regular expressions."""

LARGEST_GAP = 0.25
"""How far below the number of a mix the mean of its planes may be."""

_TOLERANCE = 0.005  # how far above: what two decimals round away


def parse_precision(text: str) -> float:
    """Read a precision as users write it: ``4`` is an int, ``3.25`` a float, and ``4.0`` is 4.

    Raises:
        PmpdError: it is not a number, or it has more than two decimals.
    """
    if not re.fullmatch(PRECISION, text):
        raise PmpdError(f"{one_line(repr(text), 60)} is not a precision like 4 or 3.25 (two decimals at most)")
    whole, _, decimals = text.partition(".")
    return float(text) if int(decimals or 0) else int(whole)


def is_precision(number: float) -> bool:
    """Return whether a number is a precision that is written as it should be."""
    if not 1 <= number <= MAX_PRECISION:  # NaN is not either
        return False
    return isinstance(number, int) or (number % 1 != 0 and number == round(number, 2))


def planes_read(mixes: Mapping[str, Mapping[str, int]], precision: float, layer: str) -> int:
    """Return how many planes a graph of some precision reads of a nested layer."""
    return precision if isinstance(precision, int) else mixes[str(precision)][layer]


def mean_planes(planes: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Return the mean of the planes that are read of layers, each weighted by the bytes of one of its planes."""
    return sum(planes[layer] * size for layer, size in sizes.items()) / sum(sizes.values())


def describe_mix(planes: Mapping[str, int]) -> str:
    """Return in one line how many layers of each kind read another number of planes than most."""
    kinds = Counter(layer.rpartition(".")[2] for layer in planes)
    ((usual, _),) = Counter(planes.values()).most_common(1)
    others = Counter((layer.rpartition(".")[2], count) for layer, count in planes.items() if count != usual)
    texts = [f"{kind} {count} in {layers} of {kinds[kind]}" for (kind, count), layers in sorted(others.items())]
    return ", ".join([*texts, f"{'the others' if texts else 'all'} {usual}"])


def check_mixes(mixes: Mapping[str, Mapping[str, int]], precisions: Iterable[float], tensors: Iterable[Tensor]) -> None:
    """Check that each precision that is a mix says of every nested layer how many planes it reads, and no others do.

    Raises:
        BundleError: a mix is missing, or it belongs to no precision; it names other layers than the nested ones, more
            planes than a layer has, or planes whose mean is not what the precision says.
    """
    wanted = {str(precision): precision for precision in precisions if not isinstance(precision, int)}
    if missing := sorted(wanted.keys() - mixes.keys()):
        raise BundleError(f"bundle.json has no mix for {missing[0]} bits: export the model again")
    stored = {tensor.layer or "": tensor for tensor in tensors if tensor.nested}
    sizes = {layer: math.prod(tensor.shape[1:]) for layer, tensor in stored.items()}
    for name, planes in mixes.items():
        where = f"bundle.json: the mix {name!r:.20}"
        if name not in wanted:
            raise BundleError(f"{where} is none of the bundle's precisions: export the model again")
        if odd := sorted(planes.keys() ^ stored.keys()):
            has = (
                "does not say how many planes it reads of" if odd[0] in stored else "names a layer that is not nested,"
            )
            raise BundleError(f"{where} {has} {odd[0]!r:.60}: export the model again")
        for layer, count in planes.items():
            most = stored[layer].shape[0]
            if not 1 <= count <= most:
                raise BundleError(
                    f"{where} reads {count!s:.20} planes of {layer!r:.60}, which has {most}: export again"
                )
        mean = mean_planes(planes, sizes) if sizes else 0.0
        if not wanted[name] - LARGEST_GAP <= mean <= wanted[name] + _TOLERANCE:
            raise BundleError(
                f"{where} reads {mean:.3f} planes in the mean, which must be up to {name} and not {LARGEST_GAP} less: "
                "export the model again"
            )
