"""The model ``pmpd`` of lm-evaluation-harness: a bundle under one schedule.

Importing this module registers it. The harness has two kinds of request. The log-likelihood of a continuation is
computed as if the model had answered with it: the context is the prompt, and is prefilled; its last logits predict the
first token of the continuation, and the tokens after that are decode steps 0, 1, … of the schedule. Generation is
`Generator.generate`, greedily.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import lm_eval.models  # noqa: F401 - first: the harness lists its own models only while there are no others
import numpy as np
import numpy.typing as npt
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pmpd.eval.harness.arguments import GenerationArguments, whole_number
from pmpd.eval.measure.models import forced_steps
from pmpd.eval.metrics.logits import negative_log_likelihood
from pmpd.runtime import Bundle, Generator, Sampling, Tokenizer
from pmpd.runtime.console.command import warn_unverified
from pmpd.runtime.errors import PmpdError, one_line, unknown_choice
from pmpd.runtime.schedule.registry import schedule_of

__all__ = ["PmpdLM"]

log = logging.getLogger("pmpd.eval")

# Logits of all steps of a call are in memory at once, in float32 and float64: 16 M of them take 200 MB.
_MOST_LOGITS = 1 << 24


@register_model("pmpd")
class PmpdLM(TemplateLM):
    """A bundle under one schedule, as the harness sees a model: ``--model pmpd --model_args bundle=DIR,…``.

    Args:
        bundle: the folder that pmpd-export wrote.
        schedule: as for ``pmpd-run --schedule``, or the name of one of the bundle's; default the bundle's default. The
            harness separates arguments by commas, so a comma of the schedule may be written as a plus sign.
        threads: threads to compute with; default all processors.
        accuracy: ``exact`` or ``int8`` kernels; default the bundle's.
        kernels: True for the bundle's, False for none, or the path of a library.
        max_length: the most tokens that the model reads at once; default its context, at most 4096.
        max_gen_toks: tokens per answer where a task does not say.
        enable_thinking: for chat templates that know this variable.
        batch_size: 1; the harness passes it on.
        max_batch_size, device, trust_remote_code: passed on by the harness, without an effect.
        unknown: arguments that do not exist.

    Raises:
        PmpdError: an argument that does not exist or whose value does not fit.
        BundleError, KernelError: as of `Generator`.
    """

    def __init__(
        self,
        bundle: str | None = None,
        schedule: str | float | None = None,
        *,
        threads: int | None = None,
        accuracy: str | None = None,
        kernels: bool | str = True,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = ("bundle", "schedule", "threads", "accuracy", "kernels", "max_length", "max_gen_toks")
            raise PmpdError(unknown_choice("model argument", name, (*known, "enable_thinking")))
        if bundle is None:
            raise PmpdError("the model pmpd needs a bundle: --model_args bundle=DIR")
        if str(batch_size) not in ("1", "None"):
            raise PmpdError(f"batch size {one_line(batch_size, 40)}: a bundle reads one text at a time, give 1")
        opened = Bundle.open(str(bundle))
        warn_unverified(opened.path, verified=opened.manifest.verified)
        text = None if schedule is None else str(schedule)
        if text is not None and text not in opened.manifest.schedules:
            text = text.replace("+", ",")
        self._schedule = schedule_of(opened, text)
        self.tokenizer = Tokenizer.from_bundle(opened)
        self._generator = Generator(
            opened,
            threads=None if threads is None else whole_number("threads", threads),
            context_length=None if max_length is None else whole_number("max_length", max_length),
            tokenizer=self.tokenizer,
            kernels=kernels,
            accuracy=accuracy,
        )
        self._max_gen_toks = whole_number("max_gen_toks", max_gen_toks)
        self._template_variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._prefilled: list[int] = []  # tokens that the cache begins with, all at the precision of the prompt
        self._logits: npt.NDArray[np.float32] | None = None  # those after the last of them
        self._steps, self._bits = 0, 0.0
        self._shortened = 0

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self._generator.cache.capacity

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            PmpdError: the bundle has none.
        """
        token_id, stop_ids = self.tokenizer.special_id("eos_token"), self._generator.bundle.stop_ids
        if token_id is None and not stop_ids:
            raise PmpdError(f"{self._generator.bundle.path} names no token that begins or ends a text: export again")
        return stop_ids[0] if token_id is None else token_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text that has no context: the one that begins texts, else the one that ends them."""
        token_id: int | None = self.tokenizer.special_id("bos_token")
        return self.eot_token_id if token_id is None else token_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the bundle, by which the harness tells prompts of several models apart."""
        return self._generator.bundle.path.resolve().name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, with the model's start token in front unless the text has it already."""
        ids = self.tokenizer.encode(string, special_tokens=add_special_tokens is not False)
        if add_special_tokens is None and ids[:2] == [self.prefix_token_id] * 2:
            del ids[0]  # a chat template writes the start token, too
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; without `add_generation_prompt` its last message is to be continued.

        Raises:
            PmpdError: there is no chat template, or it refuses the conversation.
        """
        if self.tokenizer.has_chat_template and not self.tokenizer.has_system_role:
            chat_history = [message for message in chat_history if message["role"] != "system"]
        return self.tokenizer.chat_text(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            variables=self._template_variables,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results: schedule, precisions and what was measured with them.

        ``average_bits`` is the mean over the decode steps so far, None if all answers had one token.
        """
        manifest, library = self._generator.bundle.manifest, self._generator.kernel_library
        return {
            "schedule": str(self._schedule),
            "prefill_bits": self._schedule.prefill or manifest.prefill_precision,
            "precisions": list(manifest.precisions),
            "average_bits": self._bits / self._steps if self._steps else None,
            "decode_steps": self._steps,
            "kernels": None if library is None else library.accuracy,
            "max_length": self.max_length,
            "shortened_contexts": self._shortened,
        }

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of whole texts, cut into windows as the harness does.

        A window has next to no context, so all of it but its first token is decode steps, counted from 0.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        sums = [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood in nats of each continuation, and whether greedy decoding would give it."""
        for texts, _context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                shown = "" if texts is None else f" {one_line(repr(texts[1]), 60)}"
                raise PmpdError(
                    f"the continuation{shown} has {len(continuation)} tokens: it must have 1 to {self.max_length}"
                )
        # The last token of a continuation is predicted and never read.
        rooms = [self.max_length + 1 - len(continuation) for _, _, continuation in requests]
        contexts = self._fit([context for _, context, _ in requests], rooms)
        pairs = [(context, tuple(request[2])) for context, request in zip(contexts, requests, strict=True)]
        results: dict[int, tuple[float, bool]] = {}
        for index in _in_order(pairs, step="loglikelihood", quiet=disable_tqdm):
            texts = requests[index][0]
            results[index] = self._score(*pairs[index])
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[index])
        return [results[index] for index in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a greedy answer to each prompt, up to a stop string, a stop token or the most tokens.

        Raises:
            PmpdError: an argument of the task asks for something other than greedy decoding, or leaves no room for the
                prompt.
        """
        arguments = [
            GenerationArguments.read(request.args[1], default_tokens=self._max_gen_toks) for request in requests
        ]
        longest = max((wanted.max_tokens for wanted in arguments), default=0)
        if longest >= self.max_length:
            raise PmpdError(
                f"{longest} new tokens leave no room for a prompt in {self.max_length}: "
                "set max_length in --model_args, or max_gen_toks in --gen_kwargs"
            )
        rooms = [self.max_length - wanted.max_tokens for wanted in arguments]
        prompts = self._fit([self.tok_encode(request.args[0]) for request in requests], rooms)
        texts: dict[int, str] = {}
        for index in _in_order(prompts, step="generate_until", quiet=disable_tqdm):
            prompt, wanted = list(prompts[index]), arguments[index]
            self._rewind(prompt)
            trace = self._generator.generate(
                prompt,
                max_new_tokens=wanted.max_tokens,
                schedule=self._schedule,
                sampling=Sampling(),
                stop_strings=wanted.until,
                keep_cache=True,
            )
            self._prefilled, self._logits = prompt, None
            for token in trace.tokens[1:]:
                self._count(1, token.passes)
            texts[index] = trace.text
            self.cache_hook.add_partial("generate_until", requests[index].args, trace.text)
        return [texts[index] for index in range(len(requests))]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        logits = self._read(context)
        plan = self._generator.begin(self._schedule, logits)
        most = max(1, _MOST_LOGITS // len(logits))
        total, greedy = _scored(logits[None], continuation[:1])
        done = 1
        for steps in forced_steps(self._generator, plan, continuation[:-1], most=most):
            count = len(steps.logits)
            part, same = _scored(steps.logits, continuation[done : done + count])
            total, greedy, done = total + part, greedy and same, done + count
            self._count(count, steps.passes)
        return total, greedy

    def _read(self, context: Sequence[int]) -> npt.NDArray[np.float32]:
        """Prefill a context, all that earlier requests have left of it excepted; return the logits after it."""
        tokens = list(context)
        if self._logits is not None and tokens == self._prefilled:
            self._generator.sequence.truncate(len(tokens))
            return self._logits
        same = self._rewind(tokens)
        self._logits = self._generator.prefill(tokens[same:], precision=self._schedule.prefill).copy()
        self._prefilled = tokens
        return self._logits

    def _rewind(self, tokens: list[int]) -> int:
        """Keep what was prefilled of these tokens, the last two excepted, in the cache; return how many they are.

        What was decoded goes: its keys and values are of a precision that a prompt does not have. Two tokens are left
        to read because kernels for one row round differently: so a result does not depend on the requests before it.
        """
        pairs = zip(self._prefilled, tokens[:-2], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._generator.sequence.truncate(same)
        self._prefilled, self._logits = tokens[:same], None
        return same

    def _fit(self, contexts: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the last tokens of contexts, as many as there is room for; the harness cuts long texts so, too."""
        shortened = sum(len(context) > room for context, room in zip(contexts, rooms, strict=True))
        self._shortened += shortened
        if shortened:
            log.warning(
                "%d of %d contexts lost their beginnings: context and answer do not fit the %d tokens that the model "
                "reads at once",
                *(shortened, len(contexts), self.max_length),
            )
        return [tuple(context[-room:]) for context, room in zip(contexts, rooms, strict=True)]

    def _count(self, steps: int, passes: Sequence[float]) -> None:
        self._steps += steps
        self._bits += sum(passes) * steps


def _scored(rows: npt.NDArray[np.float32], targets: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood of tokens in nats under logits ``[n, V]``, and whether each is the likeliest."""
    return -float(negative_log_likelihood(rows, targets).sum()), bool((rows.argmax(axis=-1) == targets).all())


def _in_order(requests: Sequence[Any], *, step: str, quiet: bool) -> Iterator[int]:
    """Yield the indices of requests, tuples of tokens, in their order: each shares most with the one before it."""
    order = sorted(range(len(requests)), key=lambda index: requests[index])
    yield from tqdm(order, desc=f"Running {step} requests", disable=quiet)
