"""The kinds of schedule, and reading one as users write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pmpd.runtime.errors import PmpdError, one_line, unknown_choice
from pmpd.runtime.schedule.base import Schedule
from pmpd.runtime.schedule.static import parse_static, parse_uniform

__all__ = ["KINDS", "ScheduleKind", "parse_schedule"]


@dataclass(frozen=True, kw_only=True)
class ScheduleKind:
    """A kind of schedule, written ``KIND:ARGUMENTS``.

    Attributes:
        example: one as users write it, for messages.
        parse: from the arguments and the model's precisions to the schedule; raises PmpdError with the reason alone.
    """

    example: str
    parse: Callable[[str, Sequence[float]], Schedule]


KINDS = {
    "uniform": ScheduleKind(example="uniform:4", parse=parse_uniform),
    "static": ScheduleKind(example="static:3@16,2@32", parse=parse_static),
}


def parse_schedule(text: str, precisions: Sequence[float]) -> Schedule:
    """Read a schedule as users write it, for a model that has `precisions`.

    ``uniform:P``, or just ``P``, decodes every token at P bits; P may be a mix, such as 3.25. ``static:P@STEP,…``
    switches to P bits at decode step STEP; where no precision is given for step 0, the highest one starts.
    (``static:3@0`` is therefore ``uniform:3``.)

    Raises:
        PmpdError: the text is not a schedule, a precision is not in the model, or the order breaks Eq. 3.
    """
    shown = one_line(repr(text), 100)
    kind, colon, arguments = text.strip().partition(":")
    if not colon and re.fullmatch("[0-9.]+", kind):
        kind, arguments = "uniform", kind
    if kind not in KINDS:
        examples = [known.example for known in KINDS.values()]
        raise PmpdError(f"{unknown_choice('schedule', text, examples)} (these are examples)")
    try:
        schedule = KINDS[kind].parse(arguments, precisions)
    except PmpdError as error:
        raise PmpdError(f"schedule {shown}: {error}") from None
    for precision in schedule.precisions:
        if precision not in precisions:
            raise PmpdError(f"schedule {shown}: {unknown_choice('precision', precision, precisions)}")
    return schedule
