"""PMPD's runtime: opens a bundle and decodes with it. Needs numpy and onnxruntime; imports nothing else of PMPD."""

from importlib.metadata import PackageNotFoundError, version

from pmpd.runtime.decode.generate import Generator
from pmpd.runtime.decode.sampling import Sampling
from pmpd.runtime.decode.sequence import Sequence
from pmpd.runtime.decode.trace import Token, Trace
from pmpd.runtime.engine.engine import Engine
from pmpd.runtime.engine.kernels import NodeKernel
from pmpd.runtime.errors import BundleError, ContextLengthError, KernelError, MissingExtraError, PmpdError
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.manifest import Manifest
from pmpd.runtime.schedule.adaptive import AdaptiveSchedule, RepeatSchedule
from pmpd.runtime.schedule.base import AdaptivePlan, Plan, Prefill, Schedule
from pmpd.runtime.schedule.registry import parse_schedule
from pmpd.runtime.schedule.static import StaticSchedule
from pmpd.runtime.text import Tokenizer

__all__ = [
    "AdaptivePlan",
    "AdaptiveSchedule",
    "Bundle",
    "BundleError",
    "ContextLengthError",
    "Engine",
    "Generator",
    "KernelError",
    "Manifest",
    "MissingExtraError",
    "NodeKernel",
    "Plan",
    "PmpdError",
    "Prefill",
    "RepeatSchedule",
    "Sampling",
    "Schedule",
    "Sequence",
    "StaticSchedule",
    "Token",
    "Tokenizer",
    "Trace",
    "parse_schedule",
]

# `pmpd` is a namespace package and has no attributes of its own, so the version is here.
try:
    __version__ = version("pmpd")
except PackageNotFoundError:  # an application that carries the folder without its metadata
    __version__ = "unknown"
