"""Post-training quantizers with nested codes, and the sensitivities that weight their errors."""

from pmpd.exporter.quantize.anyprecision import AnyPrecisionQuantizer
from pmpd.exporter.quantize.nested import NestedCodes, Quantizer
from pmpd.exporter.quantize.sensitivity import squared_gradients

__all__ = ["AnyPrecisionQuantizer", "NestedCodes", "Quantizer", "squared_gradients"]
