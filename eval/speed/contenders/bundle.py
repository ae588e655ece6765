"""A bundle as a contender: its runtime decodes greedily, as an application would call it, sampling included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pmpd.runtime import Bundle, Generator, Prefill
from pmpd.runtime.engine.kernels import LOGITS, MATMUL

__all__ = ["BundleContender", "load"]


@dataclass(frozen=True)
class _Steps:
    """A schedule as a list: the precision of each decode step."""

    bits: Sequence[float]
    prefill = None

    @property
    def precisions(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.bits), reverse=True))

    def begin(self, prefill: Prefill) -> Self:
        return self

    def precision(self, step: int) -> float:
        return self.bits[step]


class BundleContender:
    """A generator over a bundle, with room for `positions` tokens; `options` are the generator's."""

    def __init__(self, path: str, *, positions: int, **options: Any) -> None:
        bundle = Bundle.open(path)
        self._prefill = bundle.manifest.graph("prefill", bundle.manifest.prefill_precision).file
        self._generator = Generator(bundle, context_length=positions, **options)
        library = self._generator.kernel_library
        self.facts: dict[str, Any] = {"kernels": library and library.info}

    def run(self, *, prompt: Sequence[int], precisions: Sequence[float]) -> dict[str, Any]:
        """Time a prompt and a decode step at each of `precisions` after it, in seconds."""
        generator = self._generator
        generator.kernels(reset=True)
        limit = len(precisions) + 1  # the prompt gives the first token
        tokens = list(generator.stream(prompt, max_new_tokens=limit, schedule=_Steps(precisions), stop_ids=()))
        kernels: dict[str, set[str]] = {"prefill": set(), "decode": set()}
        matmul_seconds: float | None = None
        used = {self._prefill, *(generator.bundle.manifest.graph("decode", p).file for p in precisions)}
        for node in generator.kernels():
            if node.kernel is None or node.graph not in used:
                continue
            phase = "prefill" if node.graph == self._prefill else "decode"
            kernels[phase].add(node.kernel)
            if phase == "decode" and node.op in (LOGITS, MATMUL) and node.seconds is not None:
                matmul_seconds = (matmul_seconds or 0.0) + node.seconds
        return {
            "prefill_seconds": generator.trace.prefill_seconds,
            "seconds": [token.seconds for token in tokens[1:]],
            "matmul_seconds": matmul_seconds,
            "kernels": {phase: sorted(names) for phase, names in kernels.items()},
        }


def load(options: Mapping[str, Any]) -> BundleContender:
    """Open a bundle."""
    return BundleContender(**options)
