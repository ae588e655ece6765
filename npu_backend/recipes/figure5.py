"""Figure 5 of the PMPD paper: speed on the two NPUs over the float16 model, from our graphs and Table 1's bits.

One set of assumptions for all bars, each with its reason; none was fitted to a bar:

* throughput is decode steps a second. The paper calls it end-to-end; with the prompt's time in it, the speed-ups of
  33-token summaries could not come as close to 16/p as they do;
* the output layer is left to the host: at a precision of its own it would keep 4-bit MobileLLaMA from 4.0x;
* the quantized models keep activations and KV cache in 8 bits, as FlightLLM does; the float16 model in 16 bits;
* weights stream as planes and float16 codebooks, as our bundles store them;
* a schedule has one switch, at the step that gives the average bits of Table 1. A learned schedule varies by prompt;
  only its average is known;
* prompts have the mean length of the data sets' texts (characters by 4.0 for English, 3.3 for French, and 40 tokens of
  instructions): CNN/DM 3,825 characters (1,000 articles of the validation set), DialogSum 757 (test set), IWSLT 250
  (sentences of more than 60 tokens); answers have the length of the paper's evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import Any

from pmpd.npu_backend.hardware.description import Hardware, read_hardware
from pmpd.npu_backend.program.model import Model
from pmpd.npu_backend.study.generate import Generation, generate
from pmpd.runtime.console.output import markdown_table
from pmpd.runtime.schedule.static import StaticSchedule

__all__ = ["Bar", "Figure5", "bars", "prefill_overheads", "reproduce", "schedule_of"]

SCHEDULES = ("uniform-high", "static", "learned")
# Tokens of prompt and of answer, by data set.
LENGTHS = {"CNN/DM": (996, 256), "DialogSum": (229, 33), "IWSLT": (116, 256)}
# The NPU of each model (A.6). StableLM Zephyr has no bars.
NPUS = {"vicuna-7b": "npu-16k", "mobilellama-1.4b": "npu-4k", "phi-1.5": "npu-4k"}
# Average bits of the schedules above, Table 1.
BITS = {
    ("vicuna-7b", "CNN/DM"): (3.0, 2.39, 2.43),
    ("vicuna-7b", "DialogSum"): (3.0, 2.0, 2.74),
    ("vicuna-7b", "IWSLT"): (3.0, 2.68, 2.37),
    ("mobilellama-1.4b", "CNN/DM"): (4.0, 3.37, 3.19),
    ("mobilellama-1.4b", "DialogSum"): (4.0, 3.0, 3.21),
    ("mobilellama-1.4b", "IWSLT"): (4.0, 3.65, 3.48),
    ("phi-1.5", "CNN/DM"): (4.0, 3.71, 3.09),
    ("phi-1.5", "DialogSum"): (4.0, 3.30, 3.52),
}
# The high precision of each model, in bits; the low one is one bit less.
HIGH = {model: int(bits[0]) for (model, _), bits in BITS.items()}
# Speed-ups read off Figure 5; it has no bars of Phi-1.5.
PAPER = {
    ("vicuna-7b", "CNN/DM"): (4.9, 6.1, 5.9),
    ("vicuna-7b", "DialogSum"): (5.2, 8.0, 5.9),
    ("vicuna-7b", "IWSLT"): (5.3, 6.0, 6.9),
    ("mobilellama-1.4b", "CNN/DM"): (3.5, 4.1, 4.3),
    ("mobilellama-1.4b", "DialogSum"): (3.9, 5.2, 5.0),
    ("mobilellama-1.4b", "IWSLT"): (4.0, 4.4, 4.6),
}


@dataclass(frozen=True)
class Bar:
    """One bar: ``speedup`` and ``paper_speedup`` over the float16 model; None where the paper has no value."""

    model: str
    data: str
    schedule: str
    average_bits: float
    speedup: float
    paper_speedup: float | None
    tokens_per_second: float

    @property
    def error(self) -> float | None:
        """How far off the paper's bar it is, as a share."""
        return None if self.paper_speedup is None else self.speedup / self.paper_speedup - 1


def schedule_of(average_bits: float, high: int, steps: int) -> StaticSchedule:
    """Return the schedule of one switch from `high` bits to one less that comes nearest to an average over `steps`."""
    switch = round((average_bits - (high - 1)) * steps)
    if switch == steps:
        return StaticSchedule(((high, 0),))
    return StaticSchedule(((high, 0), (high - 1, switch)) if switch else ((high - 1, 0),))


@dataclass(frozen=True, kw_only=True)
class Figure5:
    """The figure, regenerated.

    Attributes:
        bars: one for each model, data set and schedule.
        prefill_overheads: by model and data set, how much longer a generation takes with prefill at the high precision.
    """

    bars: tuple[Bar, ...]
    prefill_overheads: dict[tuple[str, str], float]

    @property
    def errors(self) -> list[float]:
        """How far each bar of the paper is from ours, as a positive share."""
        return [abs(bar.error) for bar in self.bars if bar.error is not None]

    def to_text(self, *, details: bool = True) -> str:
        """Return the table, and with `details` how near it comes to the paper."""
        table = [["model", "data", "schedule", "bits", "tokens/s", "speed-up", "paper", "off %"]]
        for bar in self.bars:
            paper = "–" if bar.paper_speedup is None else f"{bar.paper_speedup:.1f}"
            off = "–" if bar.error is None else f"{100 * bar.error:+.1f}"
            speed = [f"{bar.average_bits:.2f}", f"{bar.tokens_per_second:.2f}", f"{bar.speedup:.2f}"]
            table.append([bar.model, bar.data, bar.schedule, *speed, paper, off])
        text = markdown_table(table, left=3)
        if not details:
            return text
        errors, shares = self.errors, self.prefill_overheads.values()
        return (
            f"{text}\n\nlearned: average bits from the paper's Table 1; no schedule was learned here\n"
            f"mean absolute error {100 * fmean(errors):.1f} %, largest {100 * max(errors):.1f} %, "
            f"of {len(errors)} bars\n"
            f"prefill at the high precision adds {100 * min(shares):.2f} % to {100 * max(shares):.2f} % "
            "to a generation (paper: 0.07 % to 1.05 %)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as JSON-ready data."""
        return {
            "rows": [asdict(bar) for bar in self.bars],
            "mean_absolute_error": fmean(self.errors),
            "largest_error": max(self.errors),
            "prefill_overheads": [
                {"model": model, "data": data, "share": share}
                for (model, data), share in self.prefill_overheads.items()
            ],
        }

    def plot(self) -> Any:
        """Return a picture of the paper's bars and ours side by side.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return _plot(self.bars)


def bars() -> Iterator[Bar]:
    """Yield the bars, each float16 model before its schedules.

    Raises:
        MissingExtraError: the exporter's packages, which make the graphs, are not installed.
    """
    for model, npu in NPUS.items():
        high = HIGH[model]
        graphs, hardware = _layers(model, high), read_hardware(npu)
        for data in (data for name, data in BITS if name == model):
            base = _generation(graphs, hardware, data, None)
            yield Bar(model, data, "fp16", 16.0, 1.0, None, base.decode_tokens_per_second)
            papers = PAPER.get((model, data), (None,) * len(SCHEDULES))
            for name, bits, paper in zip(SCHEDULES, BITS[model, data], papers, strict=True):
                result = _generation(graphs, hardware, data, schedule_of(bits, high, LENGTHS[data][1] - 1))
                speed = result.decode_tokens_per_second
                yield Bar(model, data, name, result.average_bits, speed / base.decode_tokens_per_second, paper, speed)


def prefill_overheads() -> dict[tuple[str, str], float]:
    """Return how much longer generations take for prefill at the high precision instead of the low one, as shares.

    The generations decode at the low precision throughout (Section 5.3 of the paper gives 0.07 % to 1.05 %).
    """
    shares = {}
    for model, npu in NPUS.items():
        high = HIGH[model]
        hardware, low = read_hardware(npu), StaticSchedule(((high - 1, 0),))
        graphs = [_layers(model, high, prefill=bits) for bits in (high, high - 1)]
        for data in (data for name, data in BITS if name == model):
            long, short = (_generation(graph, hardware, data, low) for graph in graphs)
            seconds = [generation.prefill_seconds + generation.decode_seconds for generation in (long, short)]
            shares[model, data] = seconds[0] / seconds[1] - 1
    return shares


def _layers(name: str, high: int, **options: int) -> Model:
    """Return the graphs of a model at a precision and the next lower one; the output layer is left to the host."""
    return Model.shipped(name, precisions=(high, high - 1), **options).without_output_layer()


def _generation(model: Model, hardware: Hardware, data: str, schedule: StaticSchedule | None) -> Generation:
    prompt, tokens = LENGTHS[data]
    return generate(model, hardware, prompt=prompt, tokens=tokens, schedule=schedule)


def reproduce() -> Figure5:
    """Simulate every bar of the figure, and what prefill at the high precision costs.

    Raises:
        MissingExtraError: the exporter's packages are not installed.
    """
    return Figure5(bars=tuple(bars()), prefill_overheads=prefill_overheads())


def _plot(rows: Sequence[Bar]) -> Any:
    """Draw the paper's bars and ours side by side, a panel per model."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from pmpd.npu_backend.study.plots import STYLE  # says so if matplotlib is missing

    colors = dict(zip(SCHEDULES, ("#8c96a8", "#2f6fb3", "#d9822b"), strict=True))
    groups = {name: list(dict.fromkeys(row.data for row in rows if row.model == name)) for name in NPUS}
    bars = {(row.model, row.data, row.schedule): row for row in rows}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        widths = [len(data) for data in groups.values()]
        panels = figure.subplots(1, len(groups), sharey=True, gridspec_kw={"width_ratios": widths})
        for axes, (name, sets) in zip(panels, groups.items(), strict=True):
            for (place, data), (i, schedule) in product(enumerate(sets), enumerate(SCHEDULES)):
                row, x = bars[name, data, schedule], place + (i - 1) * 0.29
                if row.paper_speedup is not None:
                    axes.bar(x - 0.065, row.paper_speedup, 0.12, fill=False, edgecolor=colors[schedule], linewidth=1.2)
                axes.bar(x + 0.065, row.speedup, 0.12, color=colors[schedule])
                axes.text(x + 0.065, row.speedup + 0.1, f"{row.speedup:.1f}", ha="center", fontsize=7.5)
            axes.set_title(name)
            axes.set_xticks(range(len(sets)), sets)
            axes.grid(axis="x", visible=False)
        panels[0].set_ylabel("times as fast as float16")
        handles = [Patch(color=colors[schedule]) for schedule in SCHEDULES]
        paper = Patch(fill=False, edgecolor="#66727f")
        figure.legend(
            [*handles, paper],
            ["uniform-high", "static", "learned (the paper's average bits)", "paper"],
            loc="outside upper right",
            ncols=4,
            frameon=False,
        )
    return figure
