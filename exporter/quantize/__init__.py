"""Post-training quantizers with nested codes, and the sensitivities that weight their errors."""

from pmpd.exporter.calibrate.fisher import squared_gradients
from pmpd.exporter.quantize.anyprecision import AnyPrecisionQuantizer
from pmpd.exporter.quantize.nested import NestedCodes, Quantizer

__all__ = ["AnyPrecisionQuantizer", "NestedCodes", "Quantizer", "squared_gradients"]
