"""The embedded demo model, and the script that trains such a model."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmpd.exporter.demo import demo_model_path
from pmpd.exporter.demo.corpus import BOS, EOS, PAD, pack, split_documents, train_tokenizer
from pmpd.exporter.demo.train import main as command
from pmpd.exporter.demo.train import publish
from pmpd.exporter.documents import read_documents
from pmpd.runtime.errors import PmpdError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "demo-texts.json").read_text(encoding="utf-8"))
PROMPT = GOLDEN["prompt"]
TINY = [
    *("--vocab-size=300", "--hidden-size=32", "--layers=1", "--heads=2", "--kv-heads=1", "--intermediate-size=64"),
    *("--context=64", "--sequence-length=32", "--batch-size=8", "--learning-rate=1e-2"),
]


def main(arguments: Sequence[str]) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        command(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


def stories(count: int) -> list[str]:
    """Sentences of four words each, easy to learn."""
    choose = random.Random(0).choice
    words = (["The", "One"], ["cat", "dog", "owl"], ["saw", "likes"], ["the", "a"], ["ball.", "tree.", "moon."])
    return [" ".join(choose(column) for _ in range(4) for column in words) for _ in range(count)]


def write(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def test_demo_model_continues_a_story() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    continued = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    assert tokenizer.decode(continued, skip_special_tokens=True) == PROMPT + GOLDEN["texts"]["unquantized"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    text = write(folder / "text.txt", stories(60))
    assert main(["--text", str(text), "--output", str(folder / "model"), "--tokens=15000", *TINY]) == 0
    return folder / "model"


def test_training_lowers_the_loss_of_a_loadable_model(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    rows = pack(stories(60), tokenizer.backend_tokenizer, sequence_length=32)
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size)  # An untrained model spreads its guess evenly.
    assert tokenizer("The cat").input_ids[0] == tokenizer.bos_token_id == model.config.bos_token_id == BOS
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == EOS


def test_the_folder_holds_a_hugging_face_checkpoint_and_its_recipe(trained: Path) -> None:
    # transformers 4 writes special_tokens_map.json too; 5 keeps it in tokenizer_config.json.
    assert {path.name for path in trained.iterdir()} - {"special_tokens_map.json"} == {
        *("config.json", "generation_config.json", "model.safetensors", "training.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    weights = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = json.loads((trained / "training.json").read_text())
    assert record["steps"] == math.ceil(15000 / (8 * 32))
    assert [path.name for path in trained.parent.iterdir() if "partial" in path.name] == []


def test_a_seed_fixes_the_weights(trained: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", stories(60))
    for seed in "0", "1":
        assert (
            main(["--text", str(text), "--output", str(tmp_path / seed), "--tokens=15000", "--seed", seed, *TINY]) == 0
        )
    again, other = (tmp_path / seed / "model.safetensors" for seed in "01")
    assert again.read_bytes() == (trained / "model.safetensors").read_bytes() != other.read_bytes()


def test_progress_and_result_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write(tmp_path / "text.txt", stories(60))
    assert main(["--text", str(text), "--output", str(tmp_path / "model"), "--minutes=0.01", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "3 held-out documents" in out
    last = err.splitlines()[-1]
    assert re.fullmatch(r"train (\d+)/\1, .*, 00:00 left, loss \d\.\d+, \d+ tokens/s", last)


@pytest.mark.full
def test_a_stopped_training_leaves_nothing(tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", stories(60))
    arguments = ["--text", str(text), "--output", str(tmp_path / "model"), "--minutes=1", *TINY]
    command = [sys.executable, "-m", "pmpd.exporter.demo.train", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(" parameters" in line for line in process.stderr)
        assert any(path.name.startswith("model.partial-") for path in tmp_path.iterdir())
        process.send_signal(signal.SIGTERM)
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 143
    assert last == "error: interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == [text]


def test_an_output_created_during_the_training_costs_neither_of_the_two(tmp_path: Path) -> None:
    output = tmp_path / "model"

    def train() -> None:
        with publish(output) as folder:
            (folder / "weights").write_text("hours of work")
            output.mkdir()
            (output / "thesis.txt").write_text("mine")

    with pytest.raises(PmpdError, match="the trained model stays in the former"):
        train()
    assert (output / "thesis.txt").read_text() == "mine"
    (folder,) = tmp_path.glob("model.partial-*")
    assert (folder / "weights").read_text() == "hours of work"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--text missing.txt --output model", 1, "cannot read text from 'missing.txt': No such file or directory"),
        ("--text empty.txt --output model", 1, "'empty.txt' contains no text"),
        ("--text single.txt --output model", 1, "the text is a single document"),
        ("--text text.pdf --output model", 1, "'text.pdf' has an unknown file type"),
        ("--text text.txt --output taken", 1, "output 'taken' exists: choose another --output"),
        ("--text text.txt --output nowhere/model", 1, "'nowhere' is not a folder"),
        ("--text text.txt --output model --kv-heads 3", 1, "--heads 4 is not a multiple of --kv-heads 3"),
        ("--text text.txt --output model --hidden-size 100 --heads 8", 1, "--hidden-size 100 does not split"),
        ("--text text.txt --output model --context 8", 1, "--sequence-length 256 is longer than --context 8"),
        ("--text text.txt --output model --vocab-size 9", 2, "9 is not in the range x>=259"),
        ("--output model", 2, "missing option '--text'"),
    ],
)
def test_a_user_error_is_one_line(
    arguments: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("text.txt"), stories(4))
    write(Path("single.txt"), stories(1))
    write(Path("empty.txt"), ["  ", "\n"])
    Path("taken").mkdir()
    before = set(tmp_path.rglob("*"))
    assert main([*arguments.split(), "--tokens=1000"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_without_a_duration_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--text", "text.txt", "--output", str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err == "error: how long to train is missing: give --minutes, --tokens or both\n"


def test_a_diverged_training_publishes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write(tmp_path / "text.txt", stories(60))
    options = [*TINY, "--tokens=15000", "--learning-rate=1e30"]
    assert main(["--text", str(text), "--output", str(tmp_path / "model"), *options]) == 1
    assert "lower --learning-rate 1e+30" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]


def test_documents_are_read_from_every_type(tmp_path: Path) -> None:
    expected = ["One.\nTwo.", "Three."]
    records = "\n".join(json.dumps({"text": text}) for text in [*expected, " "])
    (tmp_path / "blank.txt").write_text("One.\nTwo.\n \n\nThree.\n")
    (tmp_path / "marked.txt").write_text("One.\nTwo.<|endoftext|>\n\nThree.\n<|endoftext|>\n")
    (tmp_path / "plain.jsonl").write_text(records)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    assert all(read_documents(path) == expected for path in tmp_path.iterdir())


@pytest.mark.parametrize("line", ['{"title": "x"}', '{"text": 1}', "[1]", "{"])
def test_a_record_without_text_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(PmpdError, match=r'data\.jsonl:2 is not a JSON object with a "text" string'):
        read_documents(path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"text": "fine"}\n' * 99))
    for damaged in (whole[:-12], whole[:12] + b"\xff" * 9 + whole[21:], b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(PmpdError, match="cannot read text from"):
            read_documents(path)


def test_documents_are_split_without_loss() -> None:
    documents = [str(i) for i in range(100)]
    training, held_out = split_documents(documents, seed=0)
    assert (len(training), len(held_out)) == (95, 5)
    assert sorted(training + held_out) == sorted(documents)


def test_packed_rows_are_the_documents_end_to_end() -> None:
    tokenizer = train_tokenizer(stories(20), vocab_size=300)
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [PAD, BOS, EOS]
    texts = ["The owl: ünïcödé 🦉", "A dog."]
    ids = [i for text in texts for i in [*tokenizer.encode(text).ids, EOS]]
    assert ids.count(BOS) == 2
    assert tokenizer.decode(ids) == "".join(texts)
    rows = pack(texts, tokenizer, sequence_length=4)
    assert rows.flatten().tolist() == ids[: len(ids) // 4 * 4]
    assert pack(texts, tokenizer, sequence_length=99).tolist() == [ids + [PAD] * (99 - len(ids))]
