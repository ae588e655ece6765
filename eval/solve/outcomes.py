"""What each schedule made of each sample: measured once, kept on disk, and read again by whoever asks next.

A search that was killed, one with another tolerance, and one of other switch points all use what is there. Each line of
the file is what one sample gave; a line that a kill cut off is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pmpd.eval.solve.examiner import Examiner, Job, Measured, Outcome
from pmpd.eval.solve.workers import Workers
from pmpd.eval.tasks.base import Item
from pmpd.runtime import Schedule

__all__ = ["Outcomes", "append_line", "item_key", "read_lines"]


class Outcomes:
    """Outcomes of a task's items under schedules.

    Args:
        examiner: answers what is missing, one item after the other.
        items: what is asked.
        path: the file that outcomes are kept in.
        workers: answer instead of `examiner`, several items at once.

    Attributes:
        steps: decode steps that were computed, not those that were on disk.
    """

    def __init__(
        self,
        examiner: Examiner,
        items: Sequence[Item],
        *,
        path: Path,
        workers: Workers[Job, Measured] | None = None,
    ) -> None:
        self._items = items
        self._keys = [item_key(item) for item in items]
        self._examiner, self._workers = examiner, workers
        self.steps = 0
        self._path = path
        self._known = _read(path)

    def known(self, schedule: Schedule) -> list[Outcome]:
        """Return the outcomes of a schedule that are known, item by item."""
        outcomes = (self._known.get(key, {}).get(str(schedule)) for key in self._keys)
        return [outcome for outcome in outcomes if outcome is not None]

    def of(self, index: int, schedules: Iterable[Schedule]) -> dict[Schedule, Outcome]:
        """Return the outcomes of one item, computing those that are not known.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        return dict(self.of_each([index], schedules))[index]

    def of_each(
        self, indices: Iterable[int], schedules: Iterable[Schedule]
    ) -> Iterator[tuple[int, dict[Schedule, Outcome]]]:
        """Yield the index and the outcomes of each item, known ones first, then each as soon as it is computed.

        What is computed is on disk before it is given.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        asked = list(schedules)
        jobs = dict[str, Job]()
        places = dict[str, list[int]]()  # an item that the data have twice is computed once
        for index in indices:
            key = self._keys[index]
            known = self._known.setdefault(key, {})
            missing = tuple(schedule for schedule in asked if str(schedule) not in known)
            if not missing:
                yield index, {schedule: known[str(schedule)] for schedule in asked}
                continue
            item = self._items[index]
            jobs.setdefault(key, Job(item=item, schedules=missing, reference=known.get(str(self._examiner.reference))))
            places.setdefault(key, []).append(index)
        for key, measured in self._measured(jobs):
            self.steps += measured.steps
            self._keep(key, measured.outcomes)
            for index in places[key]:
                yield index, {schedule: self._known[key][str(schedule)] for schedule in asked}

    def _measured(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Measured]]:
        if self._workers is not None:
            yield from self._workers.run(jobs, name=lambda key: jobs[key].item.source)
            return
        for key, job in jobs.items():
            yield key, self._examiner(job)

    def _keep(self, key: str, outcomes: Mapping[Schedule, Outcome]) -> None:
        self._known[key] |= {str(schedule): outcome for schedule, outcome in outcomes.items()}
        line = {"item": key, "outcomes": {str(schedule): asdict(outcome) for schedule, outcome in outcomes.items()}}
        append_line(self._path, line)


def item_key(item: Item) -> str:
    """Return what an item is known by: its tokens and references, wherever it came from."""
    return hashlib.sha256(json.dumps([item.ids, item.references]).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, Outcome]]:
    known = dict[str, dict[str, Outcome]]()
    for document in read_lines(path):
        try:
            outcomes = {name: Outcome(**outcome) for name, outcome in document["outcomes"].items()}
            key = str(document["item"])
        except (TypeError, KeyError, AttributeError):  # somebody has changed it
            continue
        known.setdefault(key, {}).update(outcomes)
    return known


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, line by line, without lines that a kill cut off; none if there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            yield document


def append_line(path: Path, document: Mapping[str, Any]) -> None:
    """Append a JSON object to a file as a line of its own, also where a kill cut off what stands before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END) and file.read(1) == b"\n")
        file.write(("" if whole else "\n").encode() + json.dumps(document).encode() + b"\n")
