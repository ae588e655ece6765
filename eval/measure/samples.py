"""What each schedule made of each item: measured once, kept on disk, and read again by whoever asks next.

An evaluation that was killed, one with more rows, and a search all use what is there. Each line of the file is what one
item gave; a line that a kill cut off is measured again. Scores of texts are not kept but computed anew, so metrics may
come and go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pmpd.eval.measure.examiner import Baseline, Examiner, Job, Measured, item_key
from pmpd.eval.measure.workers import Workers
from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime import Schedule

__all__ = ["Samples", "append_lines", "read_lines", "sample_from"]


class Samples:
    """Samples of a task's items under schedules.

    Args:
        task: scores the texts.
        examiner: measures what is missing, one item after the other.
        items: what is asked.
        path: the file that samples are kept in.
        workers: measure instead of `examiner`, several jobs at once.
        baselines: what the floating-point model did with each item, for a task that scores its answers.
        texts: what to compare the answers of items without references with, item by item; default the answers under
            `reference`.
        reference: a schedule.
        logits: folder whose files must be there, too, for a sample to be known.

    Attributes:
        steps: decode steps that were computed, not those that were on disk.
    """

    def __init__(
        self,
        task: Task,
        examiner: Examiner,
        items: Sequence[Item],
        *,
        path: Path,
        workers: Workers[Job, Measured] | None = None,
        baselines: Sequence[Baseline] | None = None,
        texts: Sequence[tuple[str, ...]] | None = None,
        reference: Schedule | str | None = None,
        logits: Path | None = None,
    ) -> None:
        self._task, self._items = task, items
        self._keys = [item_key(item) for item in items]
        self._examiner, self._workers = examiner, workers
        self._baselines: Sequence[Baseline | None] = baselines or [None] * len(items)
        self._texts, self._reference = texts, reference
        self.steps = 0
        self._path = path
        kept = None if logits is None else {file.stem for file in logits.glob("*.npy")}
        self._known, self._kernels = _read(path)
        if kept is not None:
            self._known = {key: known for key, known in self._known.items() if key in kept}
        self._scored: dict[tuple[int, str], Sample] = {}

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels that have measured these items."""
        return sorted({kernel for key in self._keys for kernel in self._kernels.get(key, ())})

    def known(self, schedule: Schedule | str) -> list[Sample]:
        """Return the samples of a schedule that are known, item by item, without scores of texts."""
        samples = (self._known.get(key, {}).get(str(schedule)) for key in self._keys)
        return [sample for sample in samples if sample is not None]

    def of(self, index: int, schedules: Iterable[Schedule | str]) -> dict[Schedule | str, Sample]:
        """Return the samples of one item, measuring those that are not known.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        return dict(self.of_each([index], schedules))[index]

    def of_each(
        self, indices: Iterable[int], schedules: Iterable[Schedule | str]
    ) -> Iterator[tuple[int, dict[Schedule | str, Sample]]]:
        """Yield the index and the samples of each item, known ones first, then each as soon as it is measured.

        What is measured is on disk before it is given.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        asked = list(schedules)
        waiting = dict[tuple[Schedule | str, ...], list[int]]()  # by what is missing
        places = dict[str, list[int]]()  # an item that the data have twice is measured once
        for index in indices:
            known = self._known.setdefault(self._keys[index], {})
            wanted = [*asked, self._reference] if self._compares_with_reference(index) else asked
            missing = tuple(s for s in dict.fromkeys(wanted) if s is not None and str(s) not in known)
            if not missing:
                yield index, self._of(index, asked)
                continue
            if self._keys[index] not in places:
                waiting.setdefault(missing, []).append(index)
            places.setdefault(self._keys[index], []).append(index)
        jobs = dict[tuple[int, ...], Job]()
        for missing, group in waiting.items():
            if self._examiner.chunk > 1:  # side by side all are as long as the longest
                group.sort(key=lambda index: len(self._items[index].ids))
            for start in range(0, len(group), self._examiner.chunk):
                chosen = tuple(group[start : start + self._examiner.chunk])
                jobs[chosen] = Job(
                    items=tuple(self._items[i] for i in chosen),
                    schedules=missing,
                    baselines=tuple(self._baselines[i] for i in chosen),
                )
        for chosen, measured in self._measured(jobs):
            self.steps += measured.steps
            self._keep([self._keys[index] for index in chosen], measured)
            for index in chosen:
                for place in places[self._keys[index]]:
                    yield place, self._of(place, asked)

    def _measured(self, jobs: Mapping[tuple[int, ...], Job]) -> Iterator[tuple[tuple[int, ...], Measured]]:
        if self._workers is not None:
            yield from self._workers.run(jobs, name=lambda chosen: self._items[chosen[0]].source)
            return
        for chosen, job in jobs.items():
            yield chosen, self._examiner(job)

    def _compares_with_reference(self, index: int) -> bool:
        return self._reference is not None and self._texts is None and not self._items[index].references

    def _of(self, index: int, schedules: Sequence[Schedule | str]) -> dict[Schedule | str, Sample]:
        return {schedule: self._with_scores(index, schedule) for schedule in schedules}

    def _with_scores(self, index: int, schedule: Schedule | str) -> Sample:
        """Return a known sample with what its item says, and the scores of its texts."""
        name = str(schedule)
        if (index, name) not in self._scored:
            item, known = self._items[index], self._known[self._keys[index]]
            if item.references:
                texts = item.references
            elif self._texts is not None:
                texts = self._texts[index]
            else:
                texts = tuple(turn.output for turn in known[str(self._reference or schedule)].turns)
            if item.answer:
                texts = ()
            sample = replace(
                known[name], source=item.source, group=item.group or item.source, prompt=item.prompt, reference=texts
            )
            self._scored[index, name] = self._task.scored(sample)
        return self._scored[index, name]

    def _keep(self, keys: Sequence[str], measured: Measured) -> None:
        lines = []
        for key, samples in zip(keys, measured.samples, strict=True):
            by_name = {str(schedule): sample for schedule, sample in samples.items()}
            self._known[key] |= by_name
            self._kernels.setdefault(key, set()).update(measured.kernels)
            lines.append(
                {
                    "item": key,
                    "samples": {name: _line(sample) for name, sample in by_name.items()},
                    "kernels": measured.kernels,
                }
            )
        append_lines(self._path, lines)


def _line(sample: Sample) -> dict[str, Any]:
    """Return what is kept of a sample: what its item says is with the item."""
    return {name: value for name, value in asdict(sample).items() if name in ("turns", "scores", "scored_steps")}


def sample_from(line: Mapping[str, Any]) -> Sample:
    """Return a sample of its JSON, whole or without what its item says.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is something else.
    """
    turns = []
    for turn in line["turns"]:
        segments = tuple((bits, int(count), str(text)) for bits, count, text in turn["segments"])
        passes = {int(index): bits for index, bits in turn["first_passes"].items()}
        turns.append(Turn(**{**turn, "segments": segments, "first_passes": passes, "ids": tuple(turn.get("ids", ()))}))
    scores, steps = {str(name): float(score) for name, score in line["scores"].items()}, int(line["scored_steps"])
    said = {name: line[name] for name in ("source", "group", "prompt") if name in line}
    counts = {name: tuple(values) for name, values in line.get("counts", {}).items()}
    reference = tuple(line.get("reference", ()))
    return Sample(turns=tuple(turns), scores=scores, scored_steps=steps, counts=counts, reference=reference, **said)


def _read(path: Path) -> tuple[dict[str, dict[str, Sample]], dict[str, set[str]]]:
    """Return the samples that a file has of each item, by schedule, and the kernels that measured them."""
    known, kernels = dict[str, dict[str, Sample]](), dict[str, set[str]]()
    for document in read_lines(path):
        try:
            samples = {name: sample_from(line) for name, line in document["samples"].items()}
            key, names = str(document["item"]), set(map(str, document["kernels"]))
        except (TypeError, KeyError, AttributeError, ValueError):  # somebody has changed it
            continue
        known.setdefault(key, {}).update(samples)
        kernels.setdefault(key, set()).update(names)
    return known, kernels


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


def append_lines(path: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects to a file, a line each, also where a kill cut off what stands before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(document)}\n" for document in documents)
    with path.open("a+b") as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END) and file.read(1) == b"\n")
        file.write(("" if whole else "\n").encode() + lines.encode())
