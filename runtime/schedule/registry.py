"""The kinds of schedule, and reading one as users write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pmpd.runtime.errors import BundleError, PmpdError, one_line, unknown_choice
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.precision import PRECISION, parse_precision
from pmpd.runtime.schedule.adaptive import parse_adaptive, parse_repeat
from pmpd.runtime.schedule.base import Model, Schedule
from pmpd.runtime.schedule.learned import parse_learned
from pmpd.runtime.schedule.static import parse_static, parse_uniform

__all__ = ["KINDS", "ScheduleKind", "parse_schedule", "schedule_of"]


@dataclass(frozen=True, kw_only=True)
class ScheduleKind:
    """A kind of schedule, written ``KIND:ARGUMENTS``.

    Attributes:
        example: one as users write it, for messages.
        parse: from the arguments, the model and the prompt's precision to the schedule; raises PmpdError with the
            reason alone.
    """

    example: str
    parse: Callable[[str, Model, float | None], Schedule]


KINDS = {
    "uniform": ScheduleKind(example="uniform:4", parse=parse_uniform),
    "static": ScheduleKind(example="static:3@16,2@32", parse=parse_static),
    "adaptive": ScheduleKind(example="adaptive:3,4@0.5", parse=parse_adaptive),
    "repeat": ScheduleKind(example="repeat:3,4@0.5", parse=parse_repeat),
    "learned": ScheduleKind(example="learned:schedules/FILE.onnx", parse=parse_learned),
}


def parse_schedule(text: str, precisions: Sequence[float], *, bundle: Bundle | None = None) -> Schedule:
    """Read a schedule as users write it, for a model that has `precisions`.

    ``uniform:P``, or just ``P``, decodes every token at P bits; P may be a mix, such as 3.25. ``static:P@STEP,…``
    switches to P bits at decode step STEP; where no precision is given for step 0, the highest one starts.
    (``static:3@0`` is therefore ``uniform:3``.) ``adaptive:LOW,HIGH@NATS`` decodes at LOW bits, and at HIGH after
    logits whose best two are nearer to each other than that. ``repeat:LOW,HIGH@NATS`` decodes at LOW bits, and runs the
    step that gave such logits again at HIGH. ``learned:FILE`` asks a network, a file of `bundle`, for the switch points
    of each prompt; ``learned:FILE@TOKENS`` moves them in proportion to the longest answer. ``prefill:P,`` before any of
    them has the prompt run at P bits, and not at the bundle's prefill precision.

    Raises:
        PmpdError: the text is not a schedule, a precision is not in the model, the order breaks Eq. 3, or a network was
            trained for something else.
        BundleError: a network is missing or damaged.
    """
    shown = one_line(repr(text), 100)
    prefill, scheduled = _split_prefill(text.strip(), shown)
    kind, colon, arguments = scheduled.partition(":")
    if not colon and re.fullmatch("[0-9.]+", kind):
        kind, arguments = "uniform", kind
    if kind not in KINDS:
        examples = [*(bundle.manifest.schedules if bundle else ()), *(known.example for known in KINDS.values())]
        named = "names in this bundle and " if bundle else ""
        raise PmpdError(f"{unknown_choice('schedule', text, examples)} (these are {named}examples)")
    try:
        schedule = KINDS[kind].parse(arguments, Model(precisions=precisions, bundle=bundle), prefill)
    except BundleError:
        raise
    except PmpdError as error:
        raise PmpdError(f"schedule {shown}: {error}") from None
    for precision in (*schedule.precisions, *(() if prefill is None else (prefill,))):
        if precision not in precisions:
            raise PmpdError(f"schedule {shown}: {unknown_choice('precision', precision, precisions)}")
    return schedule


def schedule_of(bundle: Bundle, text: str | None = None) -> Schedule:
    """Return the schedule that a bundle has under a name, or the one that a text describes (`parse_schedule`).

    Without a text it is the bundle's default. Raises as `parse_schedule`.
    """
    manifest = bundle.manifest
    text = manifest.default_schedule if text is None else text
    return parse_schedule(manifest.schedules.get(text, text), manifest.precisions, bundle=bundle)


def _split_prefill(text: str, shown: str) -> tuple[float | None, str]:
    """Return the precision of ``prefill:P,`` at the start of a schedule, or None, and what follows it."""
    if not text.startswith("prefill:"):
        return None, text
    match = re.fullmatch(f"prefill:({PRECISION}) *, *(.+)", text)
    if match is None:
        raise PmpdError(f"schedule {shown}: it does not fit the form prefill:BITS,SCHEDULE, as in prefill:3,uniform:3")
    return parse_precision(match[1]), match[2]
