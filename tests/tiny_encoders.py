"""Tiny random encoders, made on the fly: a BERT with word pieces and a RoBERTa with byte pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
TOKENS = 20  # the most of a text
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("the", "cat", "dog", "sat", "slept", "on", "mat", "mats", "a", "is", "was", "friday", "meeting", ".", ",", "!")


def save_bert(folder: Path) -> None:
    """Write a BERT that knows `WORDS` and letters."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*names, *LETTERS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = {
        **{"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": TOKENS},
        **{"vocab_size": len(vocabulary), "pad_token_id": 0, "type_vocab_size": 2},
    }
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]", **special}
    _save(folder, tokenizer, config, options)


def save_roberta(folder: Path) -> None:
    """Write a RoBERTa that knows single bytes and `WORDS` after a space, whose tokens are others than without it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in (f"Ġ{word}" for word in WORDS if word.isalpha()):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                merges.append((word[:end], word[end]))
                vocabulary[word[: end + 1]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {
        **{"architectures": ["RobertaModel"], "model_type": "roberta", "max_position_embeddings": TOKENS + 2},
        **{"vocab_size": len(vocabulary), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        "type_vocab_size": 1,
    }
    options = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "tokenizer_class": "RobertaTokenizer"}
    _save(folder, tokenizer, config, {**special, **options})


def _save(folder: Path, tokenizer: Tokenizer, config: Mapping[str, object], options: Mapping[str, object]) -> None:
    config = {**config, **SIZES}
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, document in (
        ("config.json", config),
        ("tokenizer_config.json", {**options, "model_max_length": TOKENS}),
    ):
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    save_file(_weights(config), folder / "model.safetensors", {"format": "pt"})


def _weights(config: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Weights under the names of BERT, from a generator whose numbers numpy promises never to change."""
    hidden, intermediate = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (int(str(config["vocab_size"])), hidden),
        "embeddings.position_embeddings.weight": (int(str(config["max_position_embeddings"])), hidden),
        "embeddings.token_type_embeddings.weight": (int(str(config["type_vocab_size"])), hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (intermediate, hidden)}
        linear |= {"output.dense": (hidden, intermediate)}
        for name, shape in linear.items():
            shapes |= {f"encoder.layer.{layer}.{name}.weight": shape, f"encoder.layer.{layer}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{layer}.{name}.{part}": (hidden,) for part in ("weight", "bias")}
    generator = np.random.RandomState(7)
    weights = {name: (0.4 * generator.randn(*shape)).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + array if name.endswith("LayerNorm.weight") else array for name, array in weights.items()}


TINY_ENCODERS: dict[str, Callable[[Path], None]] = {"bert": save_bert, "roberta": save_roberta}
