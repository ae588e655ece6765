"""Text files that training and calibration read: plain text and JSON lines."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path

from pmpd.runtime.errors import PmpdError

__all__ = ["read_documents"]

DOCUMENT_END = "<|endoftext|>"


def read_documents(path: Path) -> list[str]:
    """Return the documents of a .txt, .jsonl or .jsonl.gz file, without the empty ones.

    In a .txt file ``<|endoftext|>`` separates documents, or blank lines where it does not occur.

    Raises:
        PmpdError: the file is missing, unreadable, of another type or empty, or a record has no text.
    """
    if not path.name.endswith((".txt", ".jsonl", ".jsonl.gz")):
        raise PmpdError(f"'{path}' has an unknown file type: give a .txt, .jsonl or .jsonl.gz file")
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
        raise PmpdError(f"'{path}' contains no text")
    return documents


def _record_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise PmpdError(f'{where} is not a JSON object with a "text" string: correct or remove the line')
    return text
