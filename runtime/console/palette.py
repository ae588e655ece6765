"""Colours of precisions, one order everywhere: high precision is cool (blue), low precision is warm (red)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["SHADES", "Shade", "shade_of", "shades"]


@dataclass(frozen=True)
class Shade:
    """A colour: its number among a terminal's 256, and backgrounds behind dark and behind light text."""

    name: str
    terminal: int
    light: str
    dark: str


SHADES = (
    Shade("blue", 33, "#d6e4ff", "#1f3a72"),
    Shade("azure", 39, "#cdeefa", "#124a5e"),
    Shade("teal", 43, "#cdf2ea", "#0f4f46"),
    Shade("green", 77, "#d8f3cf", "#24501c"),
    Shade("yellow", 184, "#ffe8b8", "#5a430c"),
    Shade("orange", 214, "#ffdcb5", "#6b3d0a"),
    Shade("vermilion", 208, "#ffd6c2", "#6e3117"),
    Shade("red", 196, "#ffd2cc", "#682822"),
)


def shades(count: int) -> tuple[Shade, ...]:
    """Return `count` shades from cool to warm, for precisions from high to low; of more than 8 some come twice."""
    last = len(SHADES) - 1
    return tuple(SHADES[round(i * last / max(count - 1, 1))] for i in range(count))


def shade_of(precision: float, precisions: Collection[float]) -> Shade:
    """Return the shade of one of several precisions."""
    ordered = sorted(set(precisions), reverse=True)
    return shades(len(ordered))[ordered.index(precision)]
