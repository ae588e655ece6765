"""What quantization costs, as the export measured it: a part of `bundle.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pmpd.runtime.errors import BundleError

__all__ = ["PrecisionQuality", "Quality"]

_MAX_TOKENS = 2**31 - 1
_MAX_TEXT = 100  # characters


@dataclass(frozen=True, kw_only=True)
class PrecisionQuality:
    """What one precision costs.

    Attributes:
        precision: bits of the weights.
        kl: mean Kullback-Leibler divergence from the unquantized model's next-token distribution, in nats a token.
        kl_ci95: half the width of its 95 % confidence interval.
        top1: share of the tokens at which both models find the same token most likely.
        perplexity: of the text.
    """

    precision: int | float
    kl: float
    kl_ci95: float
    top1: float
    perplexity: float

    def __post_init__(self) -> None:
        numbers = (self.kl, self.kl_ci95, self.top1, self.perplexity)
        if not all(0 <= number < math.inf for number in numbers) or self.top1 > 1:
            raise BundleError(
                f"bundle.json: quality at {self.precision!s:.30} bits is {', '.join(map(str, numbers))}: "
                "export the model again"
            )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What each precision costs on one text, with the weights of the bundle in float32 arithmetic.

    Attributes:
        text: what text it was, in words.
        tokens: how many tokens were predicted.
        perplexity: of the text under the unquantized model.
        precisions: one entry for each precision of the bundle, high to low.
    """

    text: str
    tokens: int
    perplexity: float
    precisions: tuple[PrecisionQuality, ...]

    def __post_init__(self) -> None:
        if not self.text.isprintable() or len(self.text) > _MAX_TEXT:
            raise BundleError(f"bundle.json: quality was measured on {self.text!r:.60}, which is not a plain name")
        if not 1 <= self.tokens <= _MAX_TOKENS or not 0 <= self.perplexity < math.inf:
            raise BundleError(
                f"bundle.json: quality of {self.tokens!s:.30} tokens of perplexity {self.perplexity}: "
                "export the model again"
            )

    @property
    def heading(self) -> str:
        """What was measured, for the line above the table."""
        return f"{self.tokens:,} tokens of {self.text}; ± is half of a 95 % interval"

    def rows(self) -> list[list[str]]:
        """Return the cells of a table, its header first."""
        header = ["weights", "mean KL in nats", "same top token", "perplexity"]
        rows = [
            [f"{q.precision} bits", f"{q.kl:.3g} ± {q.kl_ci95:.2g}", f"{q.top1:.1%}", f"{q.perplexity:.4g}"]
            for q in self.precisions
        ]
        return [header, ["unquantized", "", "", f"{self.perplexity:.4g}"], *rows]
