"""JSON text into frozen dataclasses, by their annotations: nothing is converted, and a misfit is named by its place."""

from __future__ import annotations

import json
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from pmpd.runtime.errors import BundleError

__all__ = ["build", "parse_object"]


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object that `text` is; `where` is what messages call it.

    Raises:
        BundleError: the text is not JSON, not an object, or an object in it names a key twice.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not valid JSON ({error}): the bundle is damaged, export again") from None
    if not isinstance(document, dict):
        raise BundleError(f"{where} must be an object, got {document!r:.60}: the bundle is damaged, export again")
    return document


def build(kind: Any, value: Any, where: str) -> Any:
    """Build a value of the annotated type `kind` from parsed JSON.

    Dataclasses, ``tuple[X, ...]``, ``dict[str, X]``, ``X | None``, ``int | float``, str, int, float, bool and Any are
    understood. A type must match exactly: True is not an int, and 1 is not a float.

    Raises:
        BundleError: a field is missing, unknown or mistyped, or the dataclass refuses its values.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:  # X | None, int | float
        return value if type(value) in args else build(args[0], value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple:
        _expect(value, list, where)
        return tuple(build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping):
        _expect(value, dict, where)
        return {name: build(args[1], item, f"{where}: {name}") for name, item in value.items()}
    _expect(value, kind, where)
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(value, dict, where)
    hints, required = _fields(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        raise BundleError(f"{where} has the unknown field {unknown[0]!r:.60}: upgrade pmpd, or export again")
    values = {name: build(hints[name], item, f"{where}: {name}") for name, item in value.items()}
    if missing := [name for name in required if name not in value]:
        raise BundleError(f"{where} has no field {missing[0]!r}: the bundle is damaged, export again")
    return kind(**values)


@cache  # a manifest has hundreds of tensors
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the types of a dataclass's fields by name, and the names of those without a default."""
    required = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return typing.get_type_hints(kind), tuple(required)


def _expect(value: Any, kind: type, where: str) -> None:
    if type(value) is not kind:
        raise BundleError(f"{where} must be {kind.__name__}, got {value!r:.60}: the bundle is damaged, export again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.60} appears twice in one object")
    return document
