"""The NPU backend: exported graphs on an analytical model of an accelerator like FlightLLM (PMPD paper, A.6)."""

from pmpd.npu_backend.generate import Generation, generate
from pmpd.npu_backend.hardware import Hardware, read_hardware, shipped_hardware
from pmpd.npu_backend.lower import lower
from pmpd.npu_backend.model import Model
from pmpd.npu_backend.simulate import Run, simulate

__all__ = [
    "Generation",
    "Hardware",
    "Model",
    "Run",
    "generate",
    "lower",
    "read_hardware",
    "shipped_hardware",
    "simulate",
]
