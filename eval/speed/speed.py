"""The task ``speed``: how fast a bundle decodes under its schedules, and peers beside it, in one run.

Each contender is a process of its own. They take turns, one repetition at a time, so that a drift of the machine's
speed hits all alike; nothing but the one whose turn it is computes.
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from pmpd.eval.measure.environment import describe_bundle, describe_machine, package_versions
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.speed.contenders import (
    IMPORTANCE,
    PEERS,
    ModelShape,
    Peer,
    Process,
    make_models,
    parse_peers,
    weights_name,
)
from pmpd.eval.speed.results import SpeedResults, SpeedRow, Timing
from pmpd.eval.speed.traffic import step_bytes
from pmpd.runtime import Bundle, StaticSchedule
from pmpd.runtime.console.progress import track
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.manifest import ACCURACIES, Manifest
from pmpd.runtime.schedule.registry import schedule_of
from pmpd.runtime.schedule.static import step_precisions

__all__ = ["SPEED", "SpeedSettings", "make_peers", "measure_speed", "prepare_speed", "start_peer", "switch_cost"]

SPEED = "speed"
SWITCHING = "switching"
_CONTENDER = Path(__file__).parent / "contenders" / "bundle.py"
_WARM_UP_STEPS = 4
_ATTEMPTS = 5  # at an undisturbed measurement, where one is asked for
_SETTLE_SECONDS = 0.2  # for the threads of the contender before, which may spin for a while


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What to measure and how.

    Attributes:
        task: ``speed``.
        schedules: one row each; default uniform at every precision of the bundle, and the bundle's own. The uniform
            ones that a mixed schedule is compared with are added.
        accuracies: how kernels compute, a process each; default the bundle's.
        kernels: a kernel library to use instead of the bundle's.
        prompt_tokens: random tokens to prefill.
        max_new_tokens: decode steps after them.
        repetitions: of everything, after a warm-up.
        seed: of the random tokens.
        max_others: repeat what other processes disturbed by more than this percentage of all processors, a few times at
            most; the least disturbed counts. Default never.
        threads: threads to compute with; default all processors this process may use.
        require_fast_kernels: whether to refuse a bundle without compiled kernels for this machine.
        peers: ``llama.cpp:Q4_0,Q2_K``, ``onnxruntime-genai:int4g32``, …
        peer_python: the Python with the peers' packages; default this one.
        peer_models: folder where the peers' models are made and kept.
        peer_weights: what they are made of: a checkpoint folder or a GGUF file; default random weights of the bundle's
            shape.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    task: str = SPEED
    schedules: tuple[str, ...] = ()
    accuracies: tuple[str, ...] = ()
    kernels: Path | None = None
    prompt_tokens: int = 128
    max_new_tokens: int = 128
    repetitions: int = 5
    seed: int = 0
    max_others: float | None = None
    threads: int | None = None
    require_fast_kernels: bool = False
    peers: tuple[str, ...] = ()
    peer_python: str = sys.executable
    peer_models: Path | None = None
    peer_weights: Path | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_new_tokens", "repetitions", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PmpdError(f"{name.replace('_', ' ')} must be 1 or more, got {value}")
        for accuracy in self.accuracies:
            if accuracy not in ACCURACIES:
                raise PmpdError(unknown_choice("accuracy", accuracy, ACCURACIES))
        if parse_peers(self.peers) and self.peer_models is None:
            raise PmpdError("peers need --peer-models: a folder for models as large as the bundle's")
        if self.peer_weights is not None:
            weights_name(self.peer_weights)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A row in the making: whose process, which bits at each step (none for a peer), and what each repetition gave."""

    name: str
    process: Process
    accuracy: str = ""
    precisions: tuple[float, ...] = ()
    peer: Peer | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)


def prepare_speed(bundle: Bundle, settings: SpeedSettings) -> dict[str, tuple[float, ...]]:
    """Return the bits of each decode step, by the name of the row: the full text of the schedule.

    Raises:
        PmpdError: a schedule, a number of tokens or a peer that does not fit the bundle.
    """
    manifest, steps = bundle.manifest, settings.max_new_tokens
    positions = settings.prompt_tokens + steps
    if positions > manifest.context_length:
        raise PmpdError(
            f"{settings.prompt_tokens} prompt and {steps} new tokens do not fit the model's context of "
            f"{manifest.context_length}: ask for fewer"
        )
    if settings.peers and settings.peer_weights is None:
        ModelShape.of(manifest)
    if settings.schedules:
        schedules = [schedule_of(bundle, name) for name in settings.schedules]
    else:  # the bundle's own schedule may decide by the prompt, and here is none
        every = [schedule_of(bundle, name) for name in (*(f"uniform:{p}" for p in manifest.precisions), None)]
        schedules = [schedule for schedule in every if isinstance(schedule, StaticSchedule) and not schedule.prefill]
    mixed = {str(schedule): step_precisions(schedule, steps) for schedule in schedules}
    needed = {p for bits in mixed.values() for p in bits}
    plan = {f"uniform:{p}": (p,) * steps for p in sorted(needed, reverse=True)} | mixed
    if len(needed) > 1:
        # Each precision twice in turn: of every two steps at one precision the first follows a switch.
        pairs = [p for p in sorted(needed, reverse=True) for _ in range(2)]
        plan[SWITCHING] = tuple(pairs[i % len(pairs)] for i in range(steps))
    return plan


def measure_speed(
    bundle: Bundle, settings: SpeedSettings, *, texts: Sequence[Sequence[int]] = (), quiet: bool = True
) -> SpeedResults:
    """Measure a bundle and peers. Unless `quiet`, progress is shown on stderr.

    The warm-up and each repetition take the next of `texts`, in a circle: token ids, as many as are prefilled and
    decoded. Default random ones.

    Raises:
        PmpdError: an option that does not fit, or a contender that fails before there is a whole repetition.
    """
    plan = prepare_speed(bundle, settings)
    texts = texts or _random_texts(bundle.manifest.architecture.vocab_size, settings)
    make_peers(bundle.manifest, settings, quiet=quiet)
    with ExitStack() as stack:
        peers = [
            _Line(name=peer.label, process=stack.enter_context(start_peer(peer, bundle.manifest, settings)), peer=peer)
            for peer in parse_peers(settings.peers)
        ]
        lines = [*_our_lines(stack, plan, bundle, settings), *peers]
        unfinished, cause = _take_turns(lines, texts, settings, quiet=quiet)
    environment = {
        **describe_machine(),
        "threads": _resources(settings)["threads"],
        "versions": package_versions(),
        "bundle": describe_bundle(bundle),
        "settings": {
            **asdict(settings),
            "kernels": settings.kernels and settings.kernels.name,
            "peer_python": Path(settings.peer_python).name,
            "peer_models": settings.peer_models and settings.peer_models.name,
            "peer_weights": settings.peer_weights and settings.peer_weights.resolve().name,
        },
    }
    return SpeedResults(
        rows=tuple(_row(line, lines, bundle, settings) for line in lines),
        switch_cost=_switch_costs(lines),
        environment=environment,
        unfinished=unfinished,
        cause=cause,
    )


def _resources(settings: SpeedSettings) -> dict[str, int]:
    """Return what every contender gets alike."""
    return {
        "threads": settings.threads or available_threads(),
        "positions": settings.prompt_tokens + settings.max_new_tokens,
    }


def _our_lines(
    stack: ExitStack, plan: Mapping[str, tuple[float, ...]], bundle: Bundle, settings: SpeedSettings
) -> Iterator[_Line]:
    """Start a process for each accuracy; yield its lines."""
    accuracies = tuple(dict.fromkeys(settings.accuracies)) or (bundle.manifest.accuracy,)
    for accuracy in accuracies:
        options = {
            **_resources(settings),
            "path": str(bundle.path),
            "accuracy": accuracy,
            "kernels": str(settings.kernels) if settings.kernels else True,
            "require_fast_kernels": settings.require_fast_kernels,
        }
        process = stack.enter_context(Process("pmpd", python=sys.executable, contender=_CONTENDER, options=options))
        for name, bits in plan.items():
            label = name if len(accuracies) == 1 else f"{name} {accuracy}"
            yield _Line(name=label, process=process, accuracy=accuracy, precisions=bits)


def _peer_options(manifest: Manifest, settings: SpeedSettings) -> dict[str, Any]:
    """Return what every peer gets: resources, the folder of its models, and what they are made of."""
    assert settings.peer_models is not None
    if settings.peer_weights is not None:
        source: dict[str, Any] = {"weights": str(settings.peer_weights.absolute())}
        name = weights_name(settings.peer_weights)
    else:
        shape = ModelShape.of(manifest)
        source, name = {"shape": asdict(shape)}, shape.digest
    return {**_resources(settings), **source, "folder": str(settings.peer_models.absolute() / name)}


def make_peers(manifest: Manifest, settings: SpeedSettings, *, quiet: bool = True) -> None:
    """Have the peers' models made that are not there yet.

    Raises:
        PmpdError: a model cannot be made, or the folder.
    """
    peers = parse_peers(settings.peers)
    if not peers:
        return
    options = _peer_options(manifest, settings)
    try:
        Path(options["folder"]).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PmpdError(f"cannot make {options['folder']} ({error.strerror}): choose another --peer-models") from None
    names = dict.fromkeys(peer.name for peer in peers)
    for name in track(names, step="models of peers", total=len(names), quiet=quiet):
        variants = [peer.variant for peer in peers if peer.name == name]
        of_peer = {**options, "variants": variants, **_importance(variants, options, settings, quiet=quiet)}
        make_models(name, python=settings.peer_python, contender=PEERS[name], options=of_peer)


def _importance(
    variants: Sequence[str], options: Mapping[str, Any], settings: SpeedSettings, *, quiet: bool
) -> dict[str, str]:
    """Have an importance matrix made if a variant wants one and there is none; return where it lies."""
    file = Path(options["folder"]) / "importance.npz"
    if not any(variant.endswith(IMPORTANCE) for variant in variants):
        return {}
    if settings.peer_weights is None:
        raise PmpdError(f"random weights have no importance matrix: give --peer-weights, or leave {IMPORTANCE} out")
    if not file.exists():
        from pmpd.eval.speed.contenders.importance import write_importance  # not at the top: it needs torch

        write_importance(settings.peer_weights, file, quiet=quiet)
    return {"importance": str(file)}


def start_peer(peer: Peer, manifest: Manifest, settings: SpeedSettings) -> Process:
    """Start a process with a model that `make_peers` made.

    Raises:
        PmpdError: it cannot be started, or has another vocabulary than the bundle.
    """
    options = {**_peer_options(manifest, settings), "variant": peer.variant}
    process = Process(peer.label, python=settings.peer_python, contender=PEERS[peer.name], options=options)
    vocab_size = manifest.architecture.vocab_size
    if (tokens := process.facts.get("vocab_size", vocab_size)) != vocab_size:
        process.close()
        raise PmpdError(
            f"{peer.label} has {tokens} tokens, the bundle {vocab_size}: give the checkpoint that the bundle was made "
            "from with --peer-weights"
        )
    return process


def _random_texts(vocab_size: int, settings: SpeedSettings) -> list[list[int]]:
    numbers, length = random.Random(settings.seed), settings.prompt_tokens + settings.max_new_tokens
    return [numbers.choices(range(vocab_size), k=length) for _ in range(settings.repetitions + 1)]


def _take_turns(
    lines: Sequence[_Line], texts: Sequence[Sequence[int]], settings: SpeedSettings, *, quiet: bool
) -> tuple[tuple[str, ...], KeyboardInterrupt | PmpdError | None]:
    """Run every line once to warm up, then once per repetition; each repetition starts with another line.

    An interrupt or a failure after at least one whole repetition ends it: the names of the others are returned, and
    the exception.
    """
    prompt, steps = settings.prompt_tokens, settings.max_new_tokens
    turns = [(n, lines[(n + i) % len(lines)]) for n in range(settings.repetitions + 1) for i in range(len(lines))]
    try:
        for repetition, line in track(turns, step="speed", total=len(turns), quiet=quiet):
            ids, count = texts[repetition % len(texts)], steps if repetition else min(steps, _WARM_UP_STEPS)
            request = {"tokens": list(ids[prompt:][:count])} if line.peer else {"precisions": line.precisions[:count]}
            attempts: list[dict[str, Any]] = []
            while not attempts or (repetition and len(attempts) < _ATTEMPTS and _disturbed(attempts[-1], settings)):
                time.sleep(_SETTLE_SECONDS)
                attempts.append(line.process.run(prompt=list(ids[:prompt]), **request))
            if repetition:
                line.answers.append(min(attempts, key=lambda answer: answer["other_load"] or 0.0))
    except (KeyboardInterrupt, PmpdError) as error:
        finished = min(len(line.answers) for line in lines)
        if not finished:
            raise
        for line in lines:
            del line.answers[finished:]
        names = tuple(f"repetition {n}" for n in range(finished + 1, settings.repetitions + 1))
        return names, error.with_traceback(None)
    return (), None


def _disturbed(answer: Mapping[str, Any], settings: SpeedSettings) -> bool:
    return settings.max_others is not None and 100 * (answer["other_load"] or 0.0) > settings.max_others


def switch_cost(precisions: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Return the time that a switch of precision adds to a step, as a share of it; None without any to compare.

    At each precision the median of the steps that follow a switch is compared with that of the others; the mean over
    precisions counts.
    """
    steps: dict[tuple[float, bool], list[float]] = defaultdict(list)
    for (before, bits), duration in zip(pairwise(precisions), seconds[1:], strict=True):
        steps[bits, before != bits].append(duration)
    costs = [
        median(switched) / median(steps[bits, False]) - 1
        for (bits, is_switch), switched in steps.items()
        if is_switch and (bits, False) in steps
    ]
    return mean(costs) if costs else None


def _switch_costs(lines: Sequence[_Line]) -> dict[str, Estimate]:
    costs = {}
    for line in lines:
        if line.name.startswith(SWITCHING):
            measured = [switch_cost(line.precisions, answer["seconds"]) for answer in line.answers]
            if values := [cost for cost in measured if cost is not None]:
                costs[line.name] = Estimate.of(values)
    return costs


def _row(line: _Line, lines: Sequence[_Line], bundle: Bundle, settings: SpeedSettings) -> SpeedRow:
    manifest, bits, steps = bundle.manifest, line.precisions, settings.max_new_tokens
    timings = tuple(
        Timing(
            prefill_seconds=answer["prefill_seconds"],
            seconds=tuple(answer["seconds"]),
            matmul_seconds=answer.get("matmul_seconds"),
            other_load=answer["other_load"],
        )
        for answer in line.answers
    )
    step_seconds = [mean(timing.seconds) for timing in timings]
    shares = [t.matmul_seconds / sum(t.seconds) for t in timings if t.matmul_seconds is not None]
    loads = [timing.other_load for timing in timings if timing.other_load is not None]
    positions = settings.prompt_tokens + (steps + 1) / 2
    facts = line.process.facts
    read: float | None = None
    if bits:
        read = mean(step_bytes(manifest, precision=p, positions=positions) for p in bits)
    elif "step_bytes" in facts:
        read = facts["step_bytes"] + facts["cache_bytes"] * positions
    uniform = {
        other.precisions[0]: other
        for other in lines
        if other.accuracy == line.accuracy and len(set(other.precisions)) == 1
    }
    expected = [sum(uniform[p].answers[n]["seconds"][step] for step, p in enumerate(bits)) for n in range(len(timings))]
    # All rows of a process run the same graph for the prompt: one figure for all of them.
    prefills = [
        answer["prefill_seconds"] for other in lines if other.process is line.process for answer in other.answers
    ]
    weights = {tensor.file for tensor in manifest.tensors}
    last = line.answers[-1]
    return SpeedRow(
        name=line.name,
        peer=line.peer is not None,
        bits=line.peer.nominal_bits if line.peer else mean(bits),
        precisions=bits,
        model_bytes=facts.get("model_bytes") or sum(manifest.files[name].size for name in weights),
        step_bytes=read,
        prefill_tps=Estimate.of([settings.prompt_tokens / seconds for seconds in prefills]),
        decode_tps=Estimate.of([1 / seconds for seconds in step_seconds]),
        gb_per_second=Estimate.of([read / seconds / 1e9 for seconds in step_seconds]) if read else None,
        matmul_share=Estimate.of(shares) if shares else None,
        expected_share=Estimate.of([p / sum(t.seconds) for p, t in zip(expected, timings, strict=True)])
        if len(set(bits)) > 1
        else None,
        other_load=Estimate.of(loads) if loads else None,
        peak_bytes=last["peak_bytes"],
        kernels=last.get("kernels", {}),
        facts=facts,
        timings=timings,
    )
