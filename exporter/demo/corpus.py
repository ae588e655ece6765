"""From documents to rows of token ids: a tokenizer trained on them, and packing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pmpd.runtime.errors import PmpdError

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "SPECIAL_TOKENS",
    "pack",
    "split_documents",
    "train_tokenizer",
]

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
PAD, BOS, EOS = range(3)  # A byte-level tokenizer never emits <unk>: it serves as padding.


def split_documents(documents: Sequence[str], *, seed: int) -> tuple[list[str], list[str]]:
    """Return the documents shuffled and split: all but one in twenty (at most 200) for training, the others held out.

    Raises:
        PmpdError: there are fewer than two documents.
    """
    if len(documents) < 2:
        raise PmpdError("the text is a single document: at least two are needed, because one is held out")
    shuffled = random.Random(seed).sample(documents, len(documents))
    held_out = max(1, min(200, len(documents) // 20))
    return shuffled[held_out:], shuffled[:held_out]


def train_tokenizer(documents: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` tokens that puts ``<s>`` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def pack(documents: Sequence[str], tokenizer: Tokenizer, *, sequence_length: int) -> torch.Tensor:
    """Return rows of token ids, int64 ``[R, sequence_length]``: ``<s> text </s>`` of all documents end to end.

    A tail shorter than a row is dropped; a text shorter than one row is padded to it.
    """
    encodings = tokenizer.encode_batch(list(documents))
    ids = list(itertools.chain.from_iterable([*encoding.ids, EOS] for encoding in encodings))
    ids += [PAD] * (sequence_length - len(ids))
    rows = len(ids) // sequence_length
    return torch.tensor(ids[: rows * sequence_length]).view(rows, sequence_length)
