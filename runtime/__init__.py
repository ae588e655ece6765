"""PMPD's runtime: opens a bundle and decodes with it. Needs numpy and onnxruntime; imports nothing else of PMPD."""

from pmpd.runtime.bundle import Bundle
from pmpd.runtime.errors import BundleError, ContextLengthError, KernelError, MissingExtraError, PmpdError
from pmpd.runtime.generate import Generator
from pmpd.runtime.kernels import NodeKernel
from pmpd.runtime.manifest import Manifest
from pmpd.runtime.sampling import Sampling
from pmpd.runtime.schedule import Schedule, StaticSchedule, parse_schedule
from pmpd.runtime.text import Tokenizer
from pmpd.runtime.trace import Token, Trace

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
