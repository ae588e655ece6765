"""Chat templates of real models, text for text against transformers: those of the models in this user's cache, and all
in the folder that the variable PMPD_CHAT_TEMPLATES names (``*.jinja``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CACHE
from conversations import differences

FOLDER = os.environ.get("PMPD_CHAT_TEMPLATES")


def templates() -> Iterator[Path]:
    yield from sorted(CACHE.glob("*/chat_template.jinja"))
    if FOLDER:
        found = sorted(Path(FOLDER).rglob("*.jinja"))
        assert found, f"PMPD_CHAT_TEMPLATES={FOLDER} holds no *.jinja"
        yield from found


def test_templates_render_as_in_transformers() -> None:
    files = list(templates())
    if not files:
        pytest.skip(f"needs models in {CACHE}, or PMPD_CHAT_TEMPLATES=FOLDER")
    wrong = {
        str(file): found[:3]
        for file in files
        if (found := differences(file.read_text(encoding="utf-8")))  # all at once: a folder may hold hundreds
    }
    assert not wrong
