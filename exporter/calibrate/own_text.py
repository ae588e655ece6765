"""Text that a model writes itself, for calibration without a file.

What a model says when nobody asks shows what it was trained on, in the proportions that it learnt (Williams et al.,
*Self-calibration for Language Model Quantization and Pruning*, NAACL 2025). A chat model also writes the questions that
it expects, when it is given what its template puts before one (Xu et al., *Magpie*, ICLR 2025).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from pmpd.exporter.calibrate.sweep import Progress
from pmpd.runtime.errors import PmpdError, one_line

__all__ = ["beginnings", "write_text"]

log = logging.getLogger(__name__)

BATCH = 32
"""Sequences that are written side by side: weights are read once for all of them."""

SEED = 20261127
_MARK = "\ue000"  # of a private use: in no template


def beginnings(tokenizer: Any, bos: int | None) -> list[list[int]]:
    """Return what texts begin with: the start token, and what a chat template puts before the first question.

    Args:
        tokenizer: of transformers, or None.
        bos: the model's start token, or None.
    """
    tokens = (bos, getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    starts = [[next(int(token) for token in tokens if token is not None)]]
    if getattr(tokenizer, "chat_template", None):
        question = [{"role": "user", "content": _MARK}]
        try:
            rendered: str = tokenizer.apply_chat_template(question, tokenize=False)
        except Exception as error:  # templates raise what they like
            log.debug("own text: the chat template does not take a question alone (%s)", one_line(error))
            return starts
        before = rendered.partition(_MARK)[0]
        if 0 < len(before) < len(rendered):
            starts.append(tokenizer(before, add_special_tokens=False)["input_ids"])
    return starts


@torch.no_grad()
def write_text(
    model: Any,
    starts: Sequence[Sequence[int]],
    *,
    samples: int,
    length: int,
    progress: Progress = lambda steps, total: steps,
) -> list[torch.Tensor]:
    """Let a model write: each token is drawn from its own distribution, and after the end of a text comes another.

    Args:
        model: a causal language model of transformers.
        starts: what sequences begin with, in turn.
        samples, length: how many sequences, and of how many tokens.
        progress: shows how much is done.

    Returns:
        Token ids, int64 ``[1, length]`` each.

    Raises:
        PmpdError: what the model expects is not finite.
    """
    generator = torch.Generator().manual_seed(SEED)
    batches = []
    for i, start in enumerate(starts):
        rows = torch.tensor([start[:length]] * len(range(i, samples, len(starts))), dtype=torch.int64)
        batches += [batch for batch in torch.split(rows, BATCH) if len(batch)]
    total = sum(length - batch.shape[1] for batch in batches)
    steps = iter(progress(range(total), total))
    written: list[torch.Tensor] = []
    for ids in batches:
        cache, fed = None, 0
        while ids.shape[1] < length:
            next(steps)
            run = model(ids[:, fed:], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, fed = run.past_key_values, ids.shape[1]
            probabilities = run.logits[:, -1].float().softmax(-1)
            if not probabilities.isfinite().all():
                raise PmpdError("the model's predictions are not finite: is the checkpoint damaged?")
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        written += torch.split(ids, 1)
    next(steps, None)  # so that the last step is shown as done
    return written
