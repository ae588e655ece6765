"""Post-training quantization with nested codes. A new method is a file here and a name in `METHODS`."""

from pmpd.exporter.quantize.anyprecision import AnyPrecision
from pmpd.exporter.quantize.base import Method, NestedCodes

__all__ = ["METHODS", "AnyPrecision", "Method", "NestedCodes"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (AnyPrecision,)}
