"""The NPU backend: exported graphs on an analytical model of an accelerator like FlightLLM (PMPD paper, A.6)."""

from pmpd.npu_backend.hardware.description import Hardware, read_hardware, shipped_hardware
from pmpd.npu_backend.machine.simulate import Run, simulate
from pmpd.npu_backend.program.lower import lower
from pmpd.npu_backend.program.model import Model
from pmpd.npu_backend.study.generate import Generation, generate

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
