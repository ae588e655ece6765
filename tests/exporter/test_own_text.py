"""Calibration without a file: the text that a model writes itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_with_tokenizer

from pmpd.exporter import ExportConfig, export_bundle
from pmpd.exporter.calibrate.own_text import SEED, beginnings, write_text
from pmpd.exporter.calibrate.store import cache_folder
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.reference import load_model
from pmpd.runtime.errors import PmpdError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(open_checkpoint(str(tiny), revision=None, accept=lambda _: None))


class Chat:
    """A tokenizer whose template puts something before a question."""

    chat_template = "a template"
    bos_token_id, eos_token_id = None, 2

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return f"<user>{messages[0]['content']}</user>"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Refusing(Chat):
    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        raise ValueError("a system message comes first")


def test_a_text_begins_with_the_start_token_or_a_question() -> None:
    question = [ord(letter) for letter in "<user>"]
    assert beginnings(Chat(), 1) == [[1], question]
    assert beginnings(Chat(), None) == [[2], question]  # the end of one text is the start of the next
    assert beginnings(Refusing(), 1) == [[1]]
    assert beginnings(None, None) == [[0]]


def test_tokens_are_drawn_from_the_models_distribution(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmpd.exporter.calibrate.own_text.BATCH", 2)
    starts = [[1], [5, 6, 7]]
    written = write_text(model, starts, samples=5, length=12)
    assert [ids.shape for ids in written] == [(1, 12)] * 5
    generator = torch.Generator().manual_seed(SEED)
    expected = []
    for start, rows in (([1], 2), ([1], 1), ([5, 6, 7], 2)):
        ids = torch.tensor([start] * rows)
        while ids.shape[1] < 12:  # all of it once more for each token
            with torch.no_grad():
                probabilities = model(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        expected += list(torch.split(ids, 1))
    assert all(torch.equal(a, b) for a, b in zip(written, expected, strict=True))
    assert len({tuple(ids[0].tolist()) for ids in written}) == 5


def test_progress_ends_when_all_is_written(model: Any) -> None:
    seen: list[int] = []

    def progress(steps: Any, total: int) -> Any:
        for step in steps:
            yield step
            seen.append(total)

    write_text(model, [[1]], samples=2, length=9, progress=progress)
    assert seen == [8] * 8


def test_a_beginning_longer_than_the_text_is_cut(model: Any) -> None:
    (ids,) = write_text(model, [list(range(1, 20))], samples=1, length=4)
    assert ids.tolist() == [[1, 2, 3, 4]]


def test_a_damaged_model_is_one_line() -> None:
    def broken(ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.full((len(ids), 1, 4), torch.nan), past_key_values=None)

    with pytest.raises(PmpdError, match="predictions are not finite: is the checkpoint damaged"):
        write_text(broken, [[1]], samples=1, length=4)


@pytest.mark.parametrize("method", ["anyprecision", "guided"])
def test_an_export_calibrates_on_it(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = ExportConfig(
        model=str(tiny), output=tmp_path / "bundle", method=method, targets=(), calibration="own",
        calibration_samples=2, calibration_length=16,
    )  # fmt: skip
    manifest = export_bundle(config)
    assert manifest.configuration["calibration"] == "own"
    assert manifest.quality is not None
    assert "calibration" not in manifest.quality.text
    assert len(list(cache_folder().iterdir())) == 1
    again = ExportConfig(**{**vars(config), "output": tmp_path / "again"})
    caplog.set_level("INFO")
    export_bundle(again)
    assert "statistics of an earlier export" in caplog.text
    assert (tmp_path / "again" / "weights.bin").read_bytes() == (tmp_path / "bundle" / "weights.bin").read_bytes()


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(PmpdError, match="unknown calibration text 'mine': choose one of"):
        ExportConfig(model="demo", output=tmp_path / "b", calibration="mine")
    with pytest.raises(PmpdError, match="is not a file: give another with --calibration, or builtin"):
        ExportConfig(model="demo", output=tmp_path / "b", calibration=tmp_path / "none.txt")
    with pytest.raises(PmpdError, match="method guided needs a calibration text: leave out --calibration none"):
        ExportConfig(model="demo", output=tmp_path / "b", method="guided", calibration="none")
