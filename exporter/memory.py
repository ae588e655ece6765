"""How much memory an export takes, before it begins."""

from __future__ import annotations

from pmpd.exporter.outline import Outline
from pmpd.exporter.quantize import METHODS
from pmpd.exporter.verify.quality import logits_nbytes

__all__ = ["peak_memory"]

LIBRARIES = 700_000_000


def peak_memory(outline: Outline, stored: int, *, workers: int) -> int:
    """Return the estimated peak of resident memory in bytes: that of the step which takes most.

    Args:
        outline: the bundle.
        stored: bytes of all tensors of the checkpoint.
        workers: layers that are quantized at a time.
    """
    steps = [_quantizing(outline, stored)]
    if outline.config.calibration is not None:
        steps.append(_calibration(outline, stored, workers))
    if outline.config.tune:
        steps.append(_tuning(outline, stored))
    return LIBRARIES + max(steps)


def _quantizing(outline: Outline, stored: int) -> int:
    """The largest layer as floats, a few times over; the checkpoint and the logits of two models in the verification.

    A checkpoint in a folder is mapped from its files.
    """
    largest = max(layer.module.out_features * layer.module.in_features for layer in outline.plan.layers)
    logits = 2 * logits_nbytes(outline.family.shape.vocab_size) if outline.config.verify else 0
    return 12 * largest + stored + logits


def _calibration(outline: Outline, stored: int, workers: int) -> int:
    config, shape = outline.config, outline.family.shape
    if "fisher" in METHODS[config.method].needs:
        return 12 * outline.parameters  # weights, their sensitivities and gradients
    # The blocks as stored, embedding and head, what goes into each block, the moments of the widest layer.
    states = config.calibration_samples * config.calibration_length * shape.hidden_size * (shape.layers + 1)
    widest = 12 * max(layer.module.in_features for layer in outline.plan.linears) ** 2
    # Then the moments of as many layers as are quantized at a time, of inputs and outputs, which are no wider.
    return max(stored + _ends(outline) + 4 * states + widest, 2 * workers * widest)


def _tuning(outline: Outline, stored: int) -> int:
    """The weights as stored and their codes, embedding and head, the logits of one piece, a few times over."""
    logits = outline.config.calibration_length * outline.family.shape.vocab_size
    return stored + outline.parameters + _ends(outline) + 24 * logits


def _ends(outline: Outline) -> int:
    """Embedding and output layer in float32."""
    return 8 * outline.family.shape.vocab_size * outline.family.shape.hidden_size
