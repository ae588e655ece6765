"""A text of our own that models are run on where an export needs activations and has no calibration text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmpd.exporter.arch import DecoderShape

__all__ = ["text_ids"]

# Prose, a dialogue, code and a list: what activations have in common in all of them is the model's, not the text's.
_TEXT = """Rivers shape the land they cross. Over thousands of years the water carries sand and stones from the hills \
to the sea, and where it slows down it leaves them behind. In 1869 the engineers measured 42 kilometres of dikes.

User: Can you explain why the sky is blue?
Assistant: Sunlight is scattered by the air. Short waves, which we see as blue, are scattered far more than long ones.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

1. Wash the apples and cut them into small pieces.
2. Heat the oven to 180 degrees.
"""
_RANDOM = 128  # tokens, for a model without tokenizer


def text_ids(folder: Path, shape: DecoderShape) -> list[int]:
    """Return the text in the tokens of the model whose ``tokenizer.json`` lies in a folder; without one, random ids."""
    ids: list[int] = []
    file = folder / "tokenizer.json"
    if file.exists():
        import tokenizers

        encoded = tokenizers.Tokenizer.from_file(str(file)).encode(_TEXT).ids
        ids = [token_id for token_id in encoded if token_id < shape.vocab_size]
    ids = ids or [int(number) for number in np.random.default_rng(0).integers(0, shape.vocab_size, _RANDOM)]
    return ids[: shape.context_length]
