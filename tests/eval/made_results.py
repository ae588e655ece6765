"""Results of evaluations that never ran: scores as a test wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.metrics.registry import METRICS
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.report.results import QualityResults, QualityRow

BYTES_AT = {4: 4e6, 3: 3e6, 2: 2e6}
BITS = {"fp": (16,) * 8, "uniform:4": (4,) * 8, "uniform:2": (4, *(2,) * 7), "static:4@0,2@3": (4,) * 4 + (2,) * 4}
"""Rows that there are, with the bits of each token of an answer."""


def made_results(
    scores: Mapping[str, Sequence[float]],
    *,
    metrics: Sequence[str] = ("rougeL",),
    text: str = "some words",
    speeds: Mapping[str, Estimate] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> QualityResults:
    """Return results with a score of each sample by row; every metric has the same.

    Args:
        scores: of the rows in `BITS`.
        metrics: names.
        text: of prompts, references and answers.
        speeds: tokens per second by row.
        settings: that differ from usual.
    """
    columns = [METRICS[name] for name in metrics]
    rows = []
    for name, values in scores.items():
        samples = [
            Sample(
                source=f"data.jsonl:{line}",
                group=f"data.jsonl:{line}",
                prompt=text,
                reference=(text,),
                turns=(_turn(BITS[name], text),),
                scores={metric.score: value for metric in columns},
                scored_steps=7,
            )
            for line, value in enumerate(values, start=1)
        ]
        row = QualityRow.of(
            name,
            samples,
            columns,
            accuracy=None if name == "fp" else "int8",
            bytes_at=None if name == "fp" else BYTES_AT,
        )
        if speeds and name in speeds:
            seconds = tuple(bits / 1000 for bits in BITS[name][1:])
            row = replace(row, decode_tps=speeds[name], step_seconds=seconds)
        rows.append(row)
    environment = {
        "date": "2026-11-28",
        "cpu": {"model": "Some <CPU>", "flags": "avx2"},
        "threads": 2,
        "versions": {"pmpd": "0.1.0"},
        "bundle": {
            "name": "demo-pmpd", "sha256": "b" * 64, "architecture": "llama", "parameters": 6_000_000,
            "precisions": [4, 2],
        },
        "reference": {"name": "demo", "backend": "transformers", "weights": {"model.safetensors": "c" * 64}},
        "data": {"name": "data.jsonl", "sha256": "a" * 64, "skipped": 2},
        "metrics": {},
        "settings": {
            "task": "dialogsum", "data": "data.jsonl", "schedules": [name for name in scores if name != "fp"],
            "limit": None, "max_new_tokens": 8, "prompt_template": None, "chat": False, "speed": bool(speeds),
            "threads": None, "address": None, **(settings or {}),
        },
        "samples": len(next(iter(scores.values()))),
    }  # fmt: skip
    return QualityResults(rows=tuple(rows), metrics=tuple(columns), environment=environment)


def _turn(bits: Sequence[float], text: str) -> Turn:
    segments: list[tuple[float, int, str]] = []
    for index, each in enumerate(bits):
        if index and each == bits[index - 1]:
            segments[-1] = (each, segments[-1][1] + 1, segments[-1][2])
        else:
            segments.append((each, 1, f" {text}"))
    return Turn(prompt_tokens=10, segments=tuple(segments), ids=tuple(range(len(bits))))
