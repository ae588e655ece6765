"""BERTScore against the package bert-score: its numbers, kept in a golden file, and itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_encoders import TINY_ENCODERS, TOKENS

from pmpd.eval.metrics import bertscore
from pmpd.eval.metrics.bertscore import Encoder, bertscore_f1
from pmpd.runtime import MissingExtraError, PmpdError

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "bertscore.json").read_text(encoding="utf-8")
)
PAIRS: list[tuple[str, str]] = [(output, reference) for output, reference in GOLDEN["pairs"]]
CASES = [(name, int(layer)) for name, layers in GOLDEN["scores"].items() for layer in layers]


@pytest.fixture(params=TINY_ENCODERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    TINY_ENCODERS[request.param](path)
    return path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    TINY_ENCODERS["bert"](tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_scores_are_those_of_the_package(name: str, layer: int, tmp_path: Path) -> None:
    TINY_ENCODERS[name](tmp_path / name)
    scores = Encoder.load(tmp_path / name, layer=layer).score(PAIRS)
    assert np.array(scores) == pytest.approx(np.array(GOLDEN["scores"][name][str(layer)]), abs=2e-6)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_scores_are_those_of_the_installed_package(name: str, layer: int, tmp_path: Path) -> None:
    package = pytest.importorskip("bert_score")
    TINY_ENCODERS[name](tmp_path / name)
    outputs, references = map(list, zip(*PAIRS, strict=True))
    # One pair a batch, as the package also matches tokens with the padding.
    expected = package.score(
        outputs, references, model_type=str(tmp_path / name), num_layers=layer, batch_size=1, device="cpu"
    )
    scores = Encoder.load(tmp_path / name, layer=layer).score(PAIRS)
    assert np.array(scores) == pytest.approx(np.stack(expected, axis=1), abs=2e-6)


def test_by_hand() -> None:
    import torch

    output = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # [CLS], a word, [SEP]
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # [CLS], two words, [SEP]
    score = bertscore._match(output, [False, True, False], reference, [False, True, True, False])
    assert score == pytest.approx((0.8, 1.0, 2 * 0.8 / 1.8))  # [CLS] and [SEP] match the words of the reference


def test_equal_texts_score_one_and_texts_without_words_nothing(folder: Path) -> None:
    encoder = Encoder.load(folder)
    equal, output, reference, both = encoder.score([("the cat", " the cat\n"), ("", "a"), ("a", " "), ("", "")])
    assert equal == pytest.approx((1, 1, 1))
    assert output == reference == both == (0, 0, 0)
    assert encoder.score([]) == []


def test_precision_and_recall_change_places_with_the_texts(folder: Path) -> None:
    (there, back) = Encoder.load(folder).score([("the cat", "a dog slept!"), ("a dog slept!", "the cat")])
    assert there == pytest.approx((back.recall, back.precision, back.f1), abs=1e-6)
    assert there.precision != pytest.approx(there.recall, abs=1e-3)


def test_what_is_behind_the_limit_does_not_count(folder: Path) -> None:
    encoder = Encoder.load(folder)
    assert encoder.limit == TOKENS
    long, longer = "the cat " * TOKENS, "the cat " * TOKENS + "slept on the mat"
    assert encoder.score([(longer, "the dog")]) == encoder.score([(long, "the dog")])


def test_without_a_limit_in_the_tokenizer_the_positions_count(folder: Path) -> None:
    options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del options["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    encoder = Encoder.load(folder)
    assert encoder.limit == TOKENS
    encoder.score([("the cat " * TOKENS, "the dog")])


def test_scores_do_not_depend_on_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.load(folder)
    whole = encoder.score(PAIRS)
    monkeypatch.setattr(bertscore, "_BATCH", 3)
    assert np.array(encoder.score(PAIRS)) == pytest.approx(np.array(whole), abs=2e-6)


def test_f1_of_several_references_is_the_mean_in_percent(bert: Path) -> None:
    encoder = Encoder.load(bert)
    first, second, third = (score.f1 for score in encoder.score([("a", "a"), ("a", "the dog"), ("mats", "mat")]))
    assert bertscore_f1(encoder, [("a", ["a", "the dog"]), ("mats", ["mat"])]) == pytest.approx(
        [50 * (first + second), 100 * third]
    )


def test_layer_is_the_one_asked_for_or_of_a_known_name_or_the_last(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Encoder.load(bert).layer == 3
    assert Encoder.load(bert, layer=1).layer == 1
    monkeypatch.setitem(bertscore._LAYERS, "google-bert/bert-base-uncased", 2)
    known = bert.rename(bert.parent / "bert-base-uncased")
    assert Encoder.load(known).layer == 2
    assert Encoder.load(known).score(PAIRS) == Encoder.load(known, layer=2).score(PAIRS)


def test_layers_of_known_encoders_are_those_of_the_package() -> None:
    utils = pytest.importorskip("bert_score.utils")
    for hub_id, layer in bertscore._LAYERS.items():
        known = utils.model2layers
        assert layer == known.get(hub_id, known.get(hub_id.rpartition("/")[2]))


def test_description_tells_encoders_apart(bert: Path) -> None:
    first = Encoder.load(bert, layer=2).describe()
    assert first == {"name": "bert", "layer": 2, "sha256": Encoder.load(bert).digest}
    weights = load_file(bert / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1e-3
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    assert Encoder.load(bert, layer=2).describe() != first


def test_names_of_the_hub_are_complete(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(bertscore, "resolve_model", lambda name: asked.append(name) or bert)
    monkeypatch.setitem(bertscore._LAYERS, "FacebookAI/roberta-large", 2)
    assert Encoder.load("roberta-large").describe()["name"] == "roberta-large"
    Encoder.load("owner/encoder")
    assert asked == ["FacebookAI/roberta-large", "owner/encoder"]


def remove(file: str) -> Any:
    return lambda folder: (folder / file).unlink()


def change_config(**entries: object) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **entries}), encoding="utf-8")

    return change


def remove_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"bert has no config\.json: give the folder of an encoder"),
        (remove("model.safetensors"), r"cannot read the encoder .*bert .*safetensors"),
        (cut_weights, r"cannot read the encoder .*bert "),
        (remove_weight, r"bert lacks weights \(encoder\.layer\.1\.output\.dense\.weight\)"),
        (change_config(model_type="unheard-of"), r"cannot read the encoder .*bert .*unheard-of"),
        (change_config(model_type="t5", is_encoder_decoder=True), r"bert is not an encoder \(t5\)"),
    ],
)
def test_damaged_encoders_are_refused_in_one_line(bert: Path, damage: Any, message: str) -> None:
    damage(bert)
    with pytest.raises(PmpdError, match=message) as caught:
        Encoder.load(bert)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused(bert: Path) -> None:
    with pytest.raises(PmpdError, match=r"needs an encoder: give its folder, or a hub id such as FacebookAI/roberta"):
        Encoder.load(None)
    with pytest.raises(PmpdError, match=r"has no layer 4: give one from 1 to 3"):
        Encoder.load(bert, layer=4)
    with pytest.raises(PmpdError, match=r"unknown encoder 'roberta-larg': choose one of roberta-large, .* folder$"):
        Encoder.load("roberta-larg")
    with pytest.raises(PmpdError, match="there is no file or folder"):
        Encoder.load(bert / "missing")


def test_without_transformers_it_says_what_to_install(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"transformers is not installed: run `pip install 'pmpd\[eval\]'`"):
        Encoder.load(bert)
