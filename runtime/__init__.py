"""PMPD's runtime: opens a bundle and decodes with it. Needs numpy and onnxruntime; imports nothing else of PMPD."""

from pmpd.runtime.decode.generate import Generator
from pmpd.runtime.decode.sampling import Sampling
from pmpd.runtime.decode.trace import Token, Trace
from pmpd.runtime.engine.kernels import NodeKernel
from pmpd.runtime.errors import BundleError, ContextLengthError, KernelError, MissingExtraError, PmpdError
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.manifest import Manifest
from pmpd.runtime.schedule.static import Schedule, StaticSchedule, parse_schedule
from pmpd.runtime.text import Tokenizer

__all__ = [
    "Bundle",
    "BundleError",
    "ContextLengthError",
    "Generator",
    "KernelError",
    "Manifest",
    "MissingExtraError",
    "NodeKernel",
    "PmpdError",
    "Sampling",
    "Schedule",
    "StaticSchedule",
    "Token",
    "Tokenizer",
    "Trace",
    "parse_schedule",
]
