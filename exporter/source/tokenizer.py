"""Text files of a bundle: tokenizer, chat template, generation configuration."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.runtime.text import Tokenizer

__all__ = ["copy_text_files"]

log = logging.getLogger(__name__)


def copy_text_files(checkpoint: Checkpoint, target: Path) -> None:
    """Write `tokenizer.json`, `special_tokens_map.json`, `chat_template*.jinja` and `generation_config.json`.

    What ends a text are the tokens of the generation configuration (without one, of `config.json`), the tokenizer's end
    token, and the one that the chat template writes after an answer: checkpoints often name only some of them.

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
        _write_json(target / "special_tokens_map.json", _specials(tokenizer))
        templates = tokenizer.chat_template or {}
        templates = templates if isinstance(templates, dict) else {"default": templates}
        for name, file in (("default", "chat_template.jinja"), ("tool_use", "chat_template_tool_use.jinja")):
            if templates.get(name):
                (target / file).write_text(templates[name], encoding="utf-8", newline="")
    generation = checkpoint.generation_config()
    generation.pop("transformers_version", None)
    for key in ("bos_token_id", "eos_token_id"):
        known = (generation.get(key), checkpoint.config.get(key), getattr(tokenizer, key, None))
        generation[key] = next((value for value in known if value is not None), None)
    if tokenizer is not None:
        stated = generation["eos_token_id"]
        ends = [*(stated if isinstance(stated, list) else [stated]), *_ends(tokenizer, target)]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        generation["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    _write_json(target / "generation_config.json", generation)


def _specials(tokenizer: Any) -> dict[str, str | list[str]]:
    """Return the texts of special tokens by the names that templates use; additional ones are a list."""
    tokens = dict(tokenizer.special_tokens_map)
    extra = getattr(tokenizer, "extra_special_tokens", None)
    if isinstance(extra, list) and extra:  # transformers 5; in 4 they are in the map, under the name that templates use
        tokens["additional_special_tokens"] = extra
    return {name: list(map(str, value)) if isinstance(value, list) else str(value) for name, value in tokens.items()}


def _ends(tokenizer: Any, target: Path) -> list[int | None]:
    """Return the tokenizer's end token, and the token after an answer of the chat template that lies in `target`."""
    ends = [tokenizer.eos_token_id]
    template = target / "chat_template.jinja"
    if template.is_file():
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
        text = template.read_text(encoding="utf-8")
        ends.append(Tokenizer(library, text, _specials(tokenizer)).end_of_turn)
    return ends


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
