"""Post-training quantization with nested codes. A new method is a file here and a name in `METHODS`."""

from pmpd.exporter.quantize.anyprecision import AnyPrecision
from pmpd.exporter.quantize.base import Method, NestedCodes
from pmpd.exporter.quantize.gptq import Gptq
from pmpd.exporter.quantize.guided import Guided
from pmpd.exporter.quantize.hqq import Hqq
from pmpd.exporter.quantize.rtn import Rtn

__all__ = ["METHODS", "AnyPrecision", "Gptq", "Guided", "Hqq", "Method", "NestedCodes", "Rtn"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (AnyPrecision, Guided, Rtn, Hqq, Gptq)}
