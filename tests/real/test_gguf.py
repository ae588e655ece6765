"""GGUF files of real models against the folders that transformers made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CACHE, fetched
from transformers import AutoTokenizer

from pmpd.exporter import ExportConfig, export_bundle
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.folder import CheckpointFolder
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.runtime import Bundle, Generator

TEXTS = (
    "Once upon a time, there was a girl named Lily.",
    " lead  and trail ",
    "tabs\tand\n\nlines\r\n",
    "Grüße, 世界! 🦉 e\u0301",
    "It's 1234567890 3.14; don't, WE'RE",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x**2  # ok",
    "",
)
TYPES = {
    "smollm2-135m": "Q4_1/Q8_0, 5.7 bits a weight",
    "qwen2.5-0.5b": "Q5_0/Q8_0/Q6_K/Q4_K, 6.2 bits a weight",
    "qwen2.5-1.5b": "Q4_K/Q6_K, 5.0 bits a weight",
}


@pytest.fixture(scope="module", params=TYPES)
def pair(request: pytest.FixtureRequest) -> tuple[Checkpoint, Path]:
    """A GGUF file and the folder made of it."""
    file, folder = CACHE / f"{request.param}.gguf", CACHE / request.param
    fetched(request.param)
    if not file.is_file():
        pytest.skip(f"needs {file}: `../shared/models/real/fetch.py` makes the folder of it, keep its model.gguf")
    return open_checkpoint(str(file)), folder


def test_tensors_are_those_of_the_folder(pair: tuple[Checkpoint, Path]) -> None:
    ours, folder = pair
    theirs = CheckpointFolder.open(folder, name="folder")
    layers = ours.config["num_hidden_layers"]
    read = (*range(3), layers // 2, layers - 1)  # every kind of tensor, in the time of a test
    for name in theirs.shards:
        if ".layers." not in name or int(name.split(".")[2]) in read:
            assert torch.equal(ours.tensor(name).half(), theirs.tensor(name).half()), name


def test_the_plan_names_the_types(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = pair
    (line,) = checkpoint.describe()
    assert TYPES[folder.name] in line
    assert "it was quantized before" in line


def test_the_configuration_is_that_of_the_folder(pair: tuple[Checkpoint, Path]) -> None:
    ours, folder = pair
    theirs = CheckpointFolder.open(folder, name="folder").config
    shared = ours.config.keys() & theirs.keys()
    assert {key: ours.config[key] for key in shared} == {key: theirs[key] for key in shared}


def test_texts_are_tokenized_as_from_the_folder(pair: tuple[Checkpoint, Path]) -> None:
    ours: Any
    theirs: Any
    ours, theirs = pair[0].tokenizer(), AutoTokenizer.from_pretrained(pair[1])
    assert ours.chat_template == theirs.chat_template
    assert ours.convert_ids_to_tokens(range(len(theirs))) == theirs.convert_ids_to_tokens(range(len(theirs)))
    assert ours.eos_token == "<|im_end|>"  # transformers' conversion takes the start token, or that of the base model
    for text in TEXTS:
        # Of SmolLM2, transformers' conversion adds a start token, which add_bos_token in the metadata denies.
        ids = ours(text).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        if "\u0301" not in text:  # which Qwen's normalizer composes
            assert ours.decode(ids) == text


@pytest.mark.slow
def test_a_bundle_of_smollm2_generates_the_same_tokens(tmp_path: Path) -> None:
    answers, bundles = [], []
    for model in ("smollm2-135m.gguf", "smollm2-135m"):
        if not (CACHE / model).exists():
            pytest.skip(f"needs {CACHE / model}: run `../shared/models/real/fetch.py smollm2-135m`")
        export_bundle(ExportConfig(model=str(CACHE / model), output=tmp_path / model, calibration="none"))
        bundle = Bundle.open(tmp_path / model)
        assert bundle.manifest.verified
        generator = Generator(bundle)
        prompt = [1, 4093, 198, 504, 3575, 282, 4649, 314]
        answers.append([token.id for token in generator.stream(prompt, max_new_tokens=64, stop_ids=())])
        bundles.append(bundle)
    ours, theirs = bundles
    for tensor in theirs.manifest.tensors:
        # Basis and bound of the output layer come from a text, before which the folder's tokenizer puts a start token.
        if tensor.role not in ("basis", "bound"):
            assert np.array_equal(ours.tensor(tensor), theirs.tensor(tensor)), tensor.name
    assert answers[0] == answers[1]
    assert len(answers[0]) == 64
