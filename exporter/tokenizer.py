"""Text files of a bundle: tokenizer, chat template, generation configuration."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from pmpd.exporter.checkpoint import Checkpoint

__all__ = ["copy_text_files"]

log = logging.getLogger(__name__)


def copy_text_files(checkpoint: Checkpoint, target: Path) -> None:
    """Write `tokenizer.json`, `special_tokens_map.json`, `chat_template.jinja` and `generation_config.json`.

    The tokenizer goes through transformers, so that it does what transformers does, also for checkpoints that have only
    a SentencePiece model. A checkpoint without a tokenizer gives a bundle without one, and a line in the log.
    """
    tokenizer = _load_tokenizer(checkpoint)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            (target / "tokenizer.json").write_bytes((Path(folder) / "tokenizer.json").read_bytes())
        specials = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        _write_json(target / "special_tokens_map.json", specials)
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    source = checkpoint.path / "generation_config.json"
    generation = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    generation.pop("transformers_version", None)
    for key in ("bos_token_id", "eos_token_id"):
        if generation.get(key) is None:
            generation[key] = checkpoint.config.get(key, getattr(tokenizer, key, None))
    _write_json(target / "generation_config.json", generation)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    if not any((checkpoint.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        log.warning("%s has no tokenizer: the bundle takes and gives token ids only", checkpoint.path)
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(checkpoint.path), local_files_only=True)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
