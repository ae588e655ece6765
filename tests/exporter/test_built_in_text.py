"""Calibration by default: the text that comes with pmpd, and the models that go without."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyModel, save_with_tokenizer

from pmpd.exporter import Export, ExportConfig, export_bundle, pipeline
from pmpd.exporter.calibrate.text import text_tokens
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.runtime.errors import MissingExtraError, PmpdError


class Letters:
    """A tokenizer of letters and numbers, for which any other character is as many tokens as it has bytes."""

    chat_template: str | None = None

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        words = text.split()
        # A word of ASCII is a token, of anything else each byte is one.
        return {"input_ids": [i for word in words for i in ([hash(word)] if word.isascii() else word.encode())]}


class Chats(Letters):
    chat_template = "a template"


class Refusing(Chats):
    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        raise ValueError("only a system message")


class Reading(Letters):
    """Keeps what it was last given."""

    text = ""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.text = text
        return super().__call__(text)


def test_the_text_is_long_and_of_many_kinds() -> None:
    tokenizer = open_checkpoint("demo").tokenizer()
    assert len(text_tokens("builtin", tokenizer)) > 2 * 64 * 256  # half of it is left to measure on
    file = Path(pipeline.__file__).parent / "calibrate" / "built_in.jsonl"
    kinds = Counter(json.loads(line)["kind"] for line in file.read_text(encoding="utf-8").splitlines())
    assert len(kinds) > 10
    assert kinds["code"] > 10
    assert kinds["chat"] > 5


def test_chats_are_in_the_models_template() -> None:
    class Keeping(Reading, Chats): ...

    tokenizer = Keeping()
    text_tokens("builtin", tokenizer)
    assert "<user>" in tokenizer.text
    assert "<assistant>" in tokenizer.text
    assert "User: " not in tokenizer.text


@pytest.mark.parametrize("kind", [Letters, Refusing])
def test_chats_are_plain_without_a_template_that_takes_them(kind: type) -> None:
    class Keeping(Reading, kind): ...  # type: ignore[misc]

    tokenizer = Keeping()
    text_tokens("builtin", tokenizer)
    assert "\n\nUser: " in tokenizer.text
    assert "<user>" not in tokenizer.text


def test_languages_that_a_tokenizer_was_not_made_for_are_left_out() -> None:
    tokenizer = Reading()
    text_tokens("builtin", tokenizer)
    assert "Bicicleta" not in tokenizer.text
    assert not any("Ѐ" <= letter <= "ӿ" for letter in tokenizer.text)  # Cyrillic
    assert "def " in tokenizer.text


def test_exports_are_calibrated_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_with_tokenizer(tmp_path / "tiny")
    config = ExportConfig(
        model=str(model), output=tmp_path / "bundle", targets=(), calibration_samples=2, calibration_length=16
    )
    manifest = export_bundle(config)
    assert manifest.configuration["method"] == "guided"
    assert manifest.configuration["calibration"] == "builtin"
    assert manifest.quality is not None
    assert manifest.quality.text == "held-out calibration text"


def test_a_model_without_tokenizer_goes_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "tiny"
    TinyModel("llama", {}).save(model)
    config = ExportConfig(model=str(model), output=tmp_path / "bundle", targets=())
    with caplog.at_level(logging.WARNING, logger="pmpd"):
        export = Export.prepare(config)
    assert (export.config.method, export.config.calibration) == ("anyprecision", None)
    assert (
        "quantized without statistics, which costs quality below 5 bits: the checkpoint has no tokenizer" in caplog.text
    )
    caplog.clear()
    quiet = ExportConfig(model=str(model), output=tmp_path / "bundle", targets=(), calibration="none")
    assert Export.prepare(quiet).config == export.config
    assert "statistics" not in caplog.text
    with pytest.raises(PmpdError, match="method guided needs statistics, but the checkpoint has no tokenizer"):
        Export.prepare(ExportConfig(model=str(model), output=tmp_path / "bundle", targets=(), method="guided"))


def test_large_models_and_machines_without_a_compiler_go_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(model=str(save_with_tokenizer(tmp_path / "tiny")), output=tmp_path / "bundle", targets=())
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "CALIBRATED", 1000)
        assert Export.prepare(config).config.calibration is None
        assert "G parameters they take hours: add --calibration builtin if you can wait" in caplog.text

    def missing() -> None:
        raise MissingExtraError("no C compiler", extra="tune")

    monkeypatch.setattr(pipeline, "require_compiled", missing)
    assert Export.prepare(config).config.method == "anyprecision"
    assert "no C compiler" in caplog.text
