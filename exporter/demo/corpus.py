"""From text files to rows of token ids: documents, a tokenizer trained on them, and packing."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pmpd.runtime.errors import PmpdError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
PAD, BOS, EOS = range(3)  # A byte-level tokenizer never emits <unk>: it serves as padding.
DOCUMENT_END = "<|endoftext|>"


def read_documents(path: Path) -> list[str]:
    """Return the documents of a .txt, .jsonl or .jsonl.gz file, without the empty ones.

    In a .txt file ``<|endoftext|>`` separates documents, or blank lines where it does not occur.

    Raises:
        PmpdError: the file is missing, unreadable, of another type or empty, or a record has no text.
    """
    if not path.name.endswith((".txt", ".jsonl", ".jsonl.gz")):
        raise PmpdError(f"'{path}' is of no known type: give a .txt, .jsonl or .jsonl.gz file")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().replace("\r\n", "\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise PmpdError(f"cannot read text from '{path}': {getattr(error, 'strerror', None) or error}") from error
    if path.suffix != ".txt":
        documents = [_record_text(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        documents = text.split(DOCUMENT_END) if DOCUMENT_END in text else re.split(r"\n\s*\n", text)
    documents = [stripped for document in documents if (stripped := document.strip())]
    if not documents:
        raise PmpdError(f"'{path}' holds no text")
    return documents


def _record_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise PmpdError(f'{where} is not a JSON object with a "text" string: mend or remove the line')
    return text


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
