"""Learned schedules: a small network chooses the switch points of each prompt (PMPD paper, Section 4.3 and A.1).

The network is an ONNX file of the bundle, made by ``pmpd-schedule learn``. It reads the keys and values that the prompt
left in one layer, once, and says how likely each of a few static schedules is to be the lowest that will do.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.errors import BundleError, PmpdError, one_line
from pmpd.runtime.format.bundle import read_file
from pmpd.runtime.format.manifest import Manifest, contained_name
from pmpd.runtime.schedule.base import Model, Prefill
from pmpd.runtime.schedule.static import StaticSchedule, parse_static

__all__ = ["SCHEDULER_KEY", "LearnedSchedule", "SchedulerCard", "parse_learned", "weights_digest"]

SCHEDULER_KEY = "pmpd.scheduler"
"""The entry of an ONNX file's metadata that holds its `SchedulerCard`."""

_MAX_BYTES = 16 << 20  # a network of a query and one hidden layer has 100 kB
_MAX_CHOICES = 1000


def weights_digest(manifest: Manifest) -> str:
    """Return what tells a bundle's weights from others: the SHA-256 of their files' SHA-256."""
    sums = sorted(manifest.files[file].sha256 for file in manifest.weight_files if file in manifest.files)
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class SchedulerCard:
    """What a scheduler's network was trained for.

    Attributes:
        choices: the static schedules that it chooses from, as text without ``static:``, low to high in bits.
        length: tokens of the answers that it was trained on.
        layer: whose keys and values it reads, from 0.
        prefill: precision of the prompts, in bits.
        confidence: how likely a choice must be good enough, by the network, to be taken: of all that are, the first.
        weights: `weights_digest` of its model.
    """

    choices: tuple[str, ...]
    length: int
    layer: int
    prefill: float
    confidence: float
    weights: str

    def __post_init__(self) -> None:
        numbers = (self.length, self.layer, self.prefill, self.confidence)
        if not all(isinstance(choice, str) for choice in self.choices) or any(type(n) is bool for n in numbers):
            raise TypeError("choices are texts")
        if not 1 <= len(self.choices) <= _MAX_CHOICES or self.length < 1 or not 0 < self.confidence < 1:
            raise ValueError("out of range")

    def to_json(self) -> str:
        """Return the text for the ONNX file's metadata."""
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read it. Raises ValueError or TypeError for what is no card."""
        document = json.loads(text)
        return cls(**{**document, "choices": tuple(document["choices"])})


class LearnedSchedule:
    """Chooses one of a few static schedules for each prompt, by its keys and values.

    Args:
        network: the ONNX file.
        manifest: of the bundle that it is for.
        file: its name, for messages and the schedule's text.
        length: the longest answer, in tokens: switch points are moved in proportion. Default what the network was
            trained on.
        prefill: the precision of the prompt, as in `Schedule`.

    Attributes:
        choices: the static schedules, low to high in bits.
        card: what the network was trained for.

    Raises:
        BundleError: the file holds something else.
        PmpdError: the network was trained for another model, or for prompts of another precision.
    """

    def __init__(
        self, network: bytes, manifest: Manifest, *, file: str, length: int | None = None, prefill: float | None = None
    ) -> None:
        self.prefill = prefill
        self._text = f"{'' if prefill is None else f'prefill:{prefill},'}learned:{file}"
        self._text += "" if length is None else f"@{length}"
        self._session, self.card = _open(network, file)
        if self.card.weights != weights_digest(manifest):
            raise PmpdError(f"{file} was trained for another model: train one for this bundle (pmpd-schedule learn)")
        bits = prefill or manifest.prefill_precision
        if self.card.prefill != bits:
            raise PmpdError(f"{file} was trained on prompts of {self.card.prefill} bits, and here they have {bits}")
        factor = (length or self.card.length) / self.card.length
        model, cache = Model(precisions=manifest.precisions), manifest.kv_cache
        try:
            self.choices = tuple(_scaled(parse_static(c, model, prefill), factor) for c in self.card.choices)
            if not 0 <= self.card.layer < cache.layers:
                raise PmpdError(f"it reads layer {self.card.layer} of {cache.layers}")
            nothing = np.zeros((cache.heads, 1, cache.head_dim), cache.dtype)
            self._probabilities(nothing, nothing)
        except PmpdError as error:
            raise BundleError(f"{file} is damaged, train it again: {error}") from None

    @property
    def precisions(self) -> tuple[float, ...]:
        """Every precision that it may choose, high to low."""
        return tuple(sorted({p for choice in self.choices for p in choice.precisions}, reverse=True))

    def begin(self, prefill: Prefill) -> StaticSchedule:
        """Return the lowest choice that is good enough for a prompt with the confidence that the card states."""
        layer = self.card.layer
        return self.choices[self.choose(prefill.kv.keys(layer), prefill.kv.values(layer))]

    def choose(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> int:
        """Return the index of the choice for keys and values ``[kv_heads, tokens, head_dim]`` of the card's layer."""
        enough = np.cumsum(self._probabilities(keys, values)) >= self.card.confidence
        return int(enough.argmax()) if enough.any() else len(self.choices) - 1

    def _probabilities(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return how likely each choice is the lowest that will do: ``[choices]``, sum 1."""
        try:
            (logits,) = self._session.run(["logits"], {"keys": keys, "values": values})
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise PmpdError(f"ONNX Runtime cannot run it ({one_line(error)})") from None
        if logits.shape != (len(self.choices),) or not np.isfinite(logits).all():
            raise PmpdError(f"it gives logits of shape {logits.shape} for {len(self.choices)} choices")
        weights = np.exp(logits.astype(np.float64) - logits.max())
        probabilities: npt.NDArray[np.float64] = weights / weights.sum()
        return probabilities

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearnedSchedule) and self._text == other._text and self.card == other.card

    def __hash__(self) -> int:
        return hash(self._text)

    def __str__(self) -> str:
        return self._text


def parse_learned(text: str, model: Model, prefill: float | None) -> LearnedSchedule:
    """Read ``FILE`` or ``FILE@TOKENS``. Raises PmpdError with the reason alone, and BundleError."""
    match = re.fullmatch(r"([^@]+?)(?:@([1-9][0-9]{0,8}))?", text.strip())
    if match is None:
        raise PmpdError(f"{one_line(repr(text), 100)} does not fit the form learned:FILE or learned:FILE@TOKENS")
    bundle = model.bundle
    if bundle is None:
        raise PmpdError("its network is a file of a bundle, and here is none: give a static schedule")
    file = contained_name(match[1])
    if file not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no file {file!r}: make one with pmpd-schedule learn")
    network = read_file(bundle.path / file, limit=_MAX_BYTES)
    length = None if match[2] is None else int(match[2])
    return LearnedSchedule(network, bundle.manifest, file=file, length=length, prefill=prefill)


def _open(network: bytes, file: str) -> tuple[Any, SchedulerCard]:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # it takes less time than to wake a thread
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        card = SchedulerCard.from_json(session.get_modelmeta().custom_metadata_map[SCHEDULER_KEY])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BundleError(f"{file} is not the network of a scheduler ({one_line(error)}): train it again") from None
    return session, card


def _scaled(schedule: StaticSchedule, factor: float) -> StaticSchedule:
    switches = tuple((precision, round(start * factor)) for precision, start in schedule.switches)
    return StaticSchedule(switches, schedule.prefill)
