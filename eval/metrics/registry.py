"""All metrics by name: the columns of tables."""

from __future__ import annotations

from collections.abc import Mapping

from pmpd.eval.metrics.base import Metric, Perplexity
from pmpd.eval.metrics.texts import TEXT_METRICS

__all__ = ["METRICS"]

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Perplexity("perplexity", "perplexity", higher_is_better=False, per_step=True),
        Perplexity("decode_perplexity", "decode perplexity", higher_is_better=False, per_step=True),
        Metric("kl_divergence", "KL divergence (nats)", higher_is_better=False, per_step=True, digits=4),
        Metric("top1_agreement", "top-1 agreement %", per_step=True, highest=100),
        Metric("pass_at_1", "pass@1 %", highest=100),
        *TEXT_METRICS.values(),
    )
}
