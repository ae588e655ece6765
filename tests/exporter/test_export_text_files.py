"""The text files of a bundle: its tokenizer and chat template do what transformers does; where texts end is known."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pmpd.exporter.demo import demo_model_path
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.tokenizer import copy_text_files
from pmpd.runtime import Bundle, Tokenizer
from pmpd.runtime.errors import BundleError, PmpdError

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    " leading and trailing spaces ",
    "tabs\tand\n\nlines\r\n",
    "Grüße, 世界! 🦉 e\u0301",
    "</s> <s> are specials; <pad> is none",
    "1234567890 3.14 -1e10",
    "",
]
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
MESSAGES = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": "Once."}]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE without a start token, as Phi has."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>", "<s>"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """A BPE with byte fallback and a start token in front, as Llama has."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(content=" ", left=1),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials)
    tokenizer.train_from_iterator(TEXTS[:1], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "metaspace": metaspace}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer and no generation_config.json."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo_model_path(), folder)
    (folder / "generation_config.json").unlink()
    return folder


def edit(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(document | changes))


def text_bundle(checkpoint: Path) -> Bundle:
    """Copy the text files of a checkpoint and open them as the bundle they would be part of."""
    target = checkpoint.parent / "bundle"
    target.mkdir()
    copy_text_files(open_checkpoint(str(checkpoint)), target)
    manifest: Any = SimpleNamespace(context_length=64, files={file.name for file in target.iterdir()})
    return Bundle(target, manifest)


def assert_same_tokens(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> None:
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text, special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def demo_tokenizers(demo_bundle: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_bundle(Bundle.open(demo_bundle)), AutoTokenizer.from_pretrained(demo_model_path())


@given(text=st.text())
def test_the_demo_bundle_tokenizes_any_text_as_transformers_does(
    demo_tokenizers: tuple[Tokenizer, Any], text: str
) -> None:
    assert_same_tokens(*demo_tokenizers, [text])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_tokenizers_do_what_transformers_does(kind: str, checkpoint: Path) -> None:
    TOKENIZERS[kind]().save(str(checkpoint / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert_same_tokens(Tokenizer.from_bundle(text_bundle(checkpoint)), theirs, TEXTS)


def test_a_sentencepiece_model_becomes_a_tokenizer(checkpoint: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = checkpoint.parent / "corpus.txt"
    corpus.write_text("\n".join([*TEXTS, *(f"The {a} saw the {b}." for a in ("cat", "owl") for b in ("sun", "sea"))]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(checkpoint / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=9,
    )
    (checkpoint / "tokenizer.json").unlink()
    edit(checkpoint / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", added_tokens_decoder={})
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert_same_tokens(Tokenizer.from_bundle(text_bundle(checkpoint)), theirs, TEXTS)


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "wanted"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}, "</s>", (7, 9, 2)),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 5}, "</s>", (2, 7)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, "</s>", (7, 2)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, None, (7,)),
        ({"temperature": 0.5}, {"eos_token_id": 5}, "</s>", (5, 2)),
        ({"eos_token_id": None}, {"eos_token_id": [5, 6]}, "</s>", (5, 6, 2)),
        (None, {"eos_token_id": 0}, "</s>", (0, 2)),
        (None, {"eos_token_id": 2}, "</s>", (2,)),
        (None, {"eos_token_id": None}, "</s>", (2,)),  # as in Phi's config.json
        (None, {"eos_token_id": None}, None, ()),
    ],
)
def test_the_end_of_a_text_is_what_the_configuration_says_and_the_tokenizer(
    generation: dict[str, Any] | None,
    config: dict[str, Any],
    tokenizer: str | None,
    wanted: tuple[int, ...],
    checkpoint: Path,
) -> None:
    if generation is not None:
        edit(checkpoint / "generation_config.json", **generation)
    edit(checkpoint / "config.json", **config)
    edit(checkpoint / "tokenizer_config.json", eos_token=tokenizer)
    (checkpoint / "special_tokens_map.json").unlink()
    bundle = text_bundle(checkpoint)
    assert bundle.stop_ids == wanted
    assert "transformers_version" not in bundle.generation_config
    assert bundle.generation_config.get("temperature") == (generation or {}).get("temperature")


@pytest.mark.parametrize(
    ("end", "wanted"), [("<|im_end|>", (2, 4096)), ("</s>", (2,)), ("\n### ", (2,))], ids=["new", "known", "none"]
)
def test_the_token_after_an_answer_ends_a_text(end: str, wanted: tuple[int, ...], checkpoint: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
    )
    assert text_bundle(checkpoint).stop_ids == wanted


def test_templates_get_all_special_tokens_and_tools_their_own_template(checkpoint: Path) -> None:
    template = "{{ additional_special_tokens[0] }}{{ eos_token }}"
    edit(
        checkpoint / "tokenizer_config.json",
        additional_special_tokens=["<|tool|>"],
        chat_template=[{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": template}],
    )
    ours = Tokenizer.from_bundle(text_bundle(checkpoint))
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    listed = {"additional_special_tokens": ["<|tool|>"]}  # transformers 5 does not give them to templates any more
    for tools in (None, [{"name": "f"}]):
        want = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False, **listed)
        assert ours.chat_text(MESSAGES, tools=tools, add_generation_prompt=False) == want


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": CHAT},
        {"chat_template.jinja": CHAT},
        {"chat_template.jinja": CHAT, "tokenizer_config.json": "the file of its own goes first"},
        {"tokenizer_config.json": [{"name": "rag", "template": "no"}, {"name": "default", "template": CHAT}]},
    ],
    ids=["tokenizer_config.json", "chat_template.jinja", "both", "several"],
)
def test_a_chat_template_comes_from_either_place(files: Mapping[str, Any], checkpoint: Path) -> None:
    if "tokenizer_config.json" in files:
        edit(checkpoint / "tokenizer_config.json", chat_template=files["tokenizer_config.json"])
    if "chat_template.jinja" in files:
        (checkpoint / "chat_template.jinja").write_text(files["chat_template.jinja"])
    ours = Tokenizer.from_bundle(text_bundle(checkpoint)).apply_chat_template(MESSAGES)
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert ours == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert theirs.decode(ours).startswith("<s>")


def test_a_checkpoint_without_chat_template_gives_none(checkpoint: Path) -> None:
    bundle = text_bundle(checkpoint)
    assert "chat_template.jinja" not in bundle.manifest.files
    assert not Tokenizer.from_bundle(bundle).has_chat_template


def test_a_checkpoint_without_tokenizer_says_so(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in checkpoint.glob("*token*"):
        file.unlink()
    with caplog.at_level(logging.WARNING, logger="pmpd"):
        bundle = text_bundle(checkpoint)
    assert "has no tokenizer: the bundle will work with token ids only" in caplog.text
    assert bundle.manifest.files == {"generation_config.json"}
    assert bundle.stop_ids == (2,)
    with pytest.raises(BundleError, match="has no tokenizer"):
        Tokenizer.from_bundle(bundle)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_file_is_one_line(name: str, content: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(content, errors="surrogateescape")
    with pytest.raises(PmpdError) as caught:
        text_bundle(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)
