"""Text files of a bundle: tokenizer, chat template, generation configuration."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from pmpd.exporter.source.checkpoint import Checkpoint

__all__ = ["copy_text_files"]

log = logging.getLogger(__name__)


def copy_text_files(checkpoint: Checkpoint, target: Path) -> None:
    """Write `tokenizer.json`, `special_tokens_map.json`, `chat_template.jinja` and `generation_config.json`.

    The tokenizer goes through transformers, so that it does what transformers does, also for checkpoints that have only
    a SentencePiece model. A checkpoint without a tokenizer gives a bundle without one, and a line in the log.

    Raises:
        PmpdError: a file is damaged, or the tokenizer cannot be loaded.
    """
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        log.warning("%s has no tokenizer: the bundle will work with token ids only", checkpoint.path)
    else:
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
    generation = checkpoint.generation_config()
    generation.pop("transformers_version", None)
    for key in ("bos_token_id", "eos_token_id"):
        known = (generation.get(key), checkpoint.config.get(key), getattr(tokenizer, key, None))
        generation[key] = next((value for value in known if value is not None), None)
    _write_json(target / "generation_config.json", generation)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
