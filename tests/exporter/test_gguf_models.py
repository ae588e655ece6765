"""GGUF files give the models that they were made from: tensors, configuration, tokenizer, bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf_files import arch_of, convert, tokenizer_metadata, write_gguf
from tiny_models import GEMMA_IDS, TINY_MODELS, TinyModel, plain_logits, plain_model, random_ids
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM

from pmpd.exporter import Export, ExportConfig, Skeleton, export_bundle
from pmpd.exporter.arch import FAMILIES, read_family
from pmpd.exporter.demo import demo_model_path
from pmpd.exporter.nn import Llama3Scaling
from pmpd.exporter.source.folder import CheckpointFolder
from pmpd.exporter.source.gguf.architectures import ARCHITECTURES, read_architecture
from pmpd.exporter.source.gguf.parts import SUPPORTED
from pmpd.exporter.source.gguf.rope import llama3_scaling
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.reference import load_model
from pmpd.exporter.verify.float_graph import FloatGraph
from pmpd.runtime import Bundle

GEMMA = {"head_dim": 16, "num_key_value_heads": 1, **GEMMA_IDS}
MODELS = {
    **{name: TINY_MODELS[name] for name in ("llama", "llama-tied-bfloat16", "llama-one-kv-head-tied", "llama-yarn")},
    **{name: TINY_MODELS[name] for name in ("llama-llama3-float16", "llama-linear-sharded")},
    **{name: TINY_MODELS[name] for name in ("qwen2", "qwen2-tied-yarn", "qwen3", "granite", "hunyuan", "phi")},
    **{
        name: TINY_MODELS[name] for name in ("stablelm", "stablelm-biases", "olmo2", "olmo2-odd", "olmo3", "ministral3")
    },
    "stablelm-parallel": TinyModel(
        "stablelm", {"hidden_size": 264, "partial_rotary_factor": 60.5 / 88, "use_parallel_residual": True}
    ),
    "llama-biases": TinyModel("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "smollm3": TinyModel(
        "smollm3", {**TINY_MODELS["smollm3"].options, "no_rope_layer_interval": 4, "num_hidden_layers": 4}
    ),
    "gemma": TinyModel("gemma", GEMMA),
    "gemma2": TinyModel(
        "gemma2",
        {
            **GEMMA,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": TinyModel(
        "gemma3_text",
        {
            **GEMMA,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "num_hidden_layers": 6,
            "rope_theta": 500.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 3.0,
        },
    ),
    **{name: TINY_MODELS[name] for name in ("phi3", "phi3-window", "phi3-longrope")},
}


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_the_folder_computes(name: str, tmp_path: Path) -> None:
    folder = MODELS[name].save(tmp_path / "folder")
    checkpoint = open_checkpoint(str(convert(folder, tmp_path / "model.gguf")))
    source = CheckpointFolder.open(folder, name="folder")
    for tensor in source.shards:
        torch.testing.assert_close(
            checkpoint.tensor(tensor).float(), source.tensor(tensor).float(), rtol=0, atol=1e-6, msg=tensor
        )
    model = plain_model(folder)
    ids = random_ids(131, 24)
    wanted = plain_logits(model, ids)
    loaded = plain_logits(load_model(checkpoint), ids)
    np.testing.assert_allclose(loaded, wanted, rtol=1e-4, atol=1e-4)
    if checkpoint.config["model_type"] in FAMILIES:
        family = read_family(checkpoint.config)
        np.testing.assert_allclose(FloatGraph(checkpoint, family).logits(ids), wanted, rtol=0, atol=0.02)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_queries_keys_and_values_in_one_tensor_come_apart(kind: str, tmp_path: Path) -> None:
    folder = TinyModel("phi", {"hidden_size": 96, "intermediate_size": 64, "partial_rotary_factor": 0.5}).save(
        tmp_path / "folder"
    )
    files = [convert(folder, tmp_path / f"{stacked}.gguf", kind=kind, stacked=stacked) for stacked in (False, True)]
    apart, stacked = (open_checkpoint(str(file)) for file in files)
    assert "blk.1.attn_qkv.bias" in stacked.parts.tensors
    for tensor in CheckpointFolder.open(folder, name="folder").shards:
        stacked.require(tensor, tuple(apart.tensor(tensor).shape))
        assert torch.equal(stacked.tensor(tensor), apart.tensor(tensor)), tensor


@pytest.mark.parametrize("size", [64, 80, 88, 96, 128])
def test_the_rotated_share_gives_back_how_many_elements_are_rotated(size: int) -> None:
    for dim in range(2, size + 1, 2):
        numbers = {"embedding_length": size, "attention.head_count": 1, "rope.dimension_count": dim}
        config = ARCHITECTURES["stablelm"].fields(lambda key, *default, numbers=numbers: numbers.get(key, *default))
        assert int(size * config["partial_rotary_factor"]) == dim


def test_a_mistral_that_does_not_scale_queries_is_a_llama() -> None:
    keys = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    metadata = {"general.architecture": "mistral3", **{f"mistral3.{key}": 8 for key in keys}}
    assert read_architecture(metadata, 4, tied=True)[1]["model_type"] == "llama"
    metadata |= {"mistral3.attention.temperature_scale": 0.1, "mistral3.rope.scaling.type": "yarn"}
    metadata |= {"mistral3.rope.scaling.factor": 4.0, "mistral3.rope.scaling.yarn_log_multiplier": 0.5}
    config = read_architecture(metadata, 4, tied=True)[1]
    assert config["model_type"] == "ministral3"
    rope = config["rope_parameters"]
    assert (rope["mscale"], rope["mscale_all_dim"], rope["llama_4_scaling_beta"]) == (1.0, 0.5, 0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_of_tensors_are_those_of_the_package(name: str) -> None:
    names = gguf.get_tensor_name_map(arch_of(name), 2)
    kinds = {architecture.model_type: architecture for architecture in ARCHITECTURES.values()}
    model = next(tiny for tiny in MODELS.values() if tiny.family == ARCHITECTURES[name].model_type)
    assert kinds[model.family] is ARCHITECTURES[name]
    with torch.device("meta"):
        parameters = [key for key, _ in AutoModelForCausalLM.from_config(model._config()).named_parameters()]
    for parameter in parameters:
        stem, _, suffix = parameter.rpartition(".")
        if ".layers." not in stem or stem.split(".")[2] in "01":
            assert ARCHITECTURES[name].stored_name(parameter) == f"{names.get_name(stem)}.{suffix}", parameter


GEMMA3_METADATA = {
    "general.architecture": "gemma3",
    **{f"gemma3.{key}": 8 for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")},
    "gemma3.attention.head_count": 1,
}


@pytest.mark.parametrize(
    ("metadata", "sliding"),
    [
        ({}, ()),  # what the conversion leaves out if no layer has a window
        ({"attention.sliding_window": 4}, (0, 1, 2, 3, 4, 6, 7)),
        ({"attention.sliding_window": 4, "attention.sliding_window_pattern": 2}, (0, 2, 4, 6)),
        ({"attention.sliding_window": 4, "attention.sliding_window_pattern": [True] * 3 + [False] * 5}, (0, 1, 2)),
    ],
)
def test_layers_of_gemma3_have_windows_as_the_metadata_says(metadata: dict[str, Any], sliding: tuple[int, ...]) -> None:
    named = {f"gemma3.{key}": value for key, value in metadata.items()}
    _, config = read_architecture(GEMMA3_METADATA | named, 131, tied=True)
    assert tuple(i for i, kind in enumerate(config["layer_types"]) if kind == "sliding_attention") == sliding
    windows = read_family(config).windows
    assert tuple(i for i, window in enumerate(windows) if window is not None) == sliding


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "numbers", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 6.0, 4096)], ids=["3.1", "3.2", "other"]
)
def test_the_scaling_of_llama_3_comes_back_from_its_factors(
    numbers: tuple[float, float, float, int], head_dim: int
) -> None:
    plain = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    frequencies = Llama3Scaling(*numbers).frequencies(head_dim, 500000.0)
    factors = (plain / frequencies).astype(np.float32)
    scaling = llama3_scaling(factors, 500000.0)
    assert scaling is not None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    again = Llama3Scaling(*(scaling[key] for key in names))
    np.testing.assert_allclose(again.frequencies(head_dim, 500000.0), frequencies, rtol=2e-4)
    if numbers[1:] == (1.0, 4.0, 8192):
        assert tuple(scaling[key] for key in names) == numbers
    assert llama3_scaling(np.ones(32, np.float32), 1e4) is None


# ---- Values of quantized types, by the format's definition and one at a time.


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], np.float16)[0])


def nibble(block: bytes, at: int, element: int) -> int:
    """Return one of 32 four-bit numbers: the low halves of 16 bytes, then the high ones."""
    return block[at + element % 16] >> (4 * (element // 16)) & 15


def scale_and_minimum(scales: bytes, group: int) -> tuple[int, int]:
    """Return a pair of 6-bit numbers of the 12 bytes of Q4_K and Q5_K."""
    if group < 4:
        return scales[group] & 63, scales[group + 4] & 63
    low, high = scales[group + 4], scales[group - 4] >> 6
    return low & 15 | high << 4, low >> 4 | scales[group] >> 6 << 4


def value(kind: str, block: bytes, i: int) -> float:
    """Return element `i` of a block."""
    group, inside = divmod(i, 32)
    match kind:
        case "Q8_0":
            return half(block, 0) * int(np.int8(np.uint8(block[2 + i])))
        case "Q4_0":
            return half(block, 0) * (nibble(block, 2, i) - 8)
        case "Q4_1":
            return half(block, 0) * nibble(block, 4, i) + half(block, 2)
        case "Q5_0":
            high = int.from_bytes(block[2:6], "little") >> i & 1
            return half(block, 0) * ((nibble(block, 6, i) | high << 4) - 16)
        case "Q5_1":
            high = int.from_bytes(block[4:8], "little") >> i & 1
            return half(block, 0) * (nibble(block, 8, i) | high << 4) + half(block, 2)
        case "Q2_K":
            scale = block[i // 16]
            bits = block[16 + i // 128 * 32 + inside] >> 2 * (group % 4) & 3
            return half(block, 80) * (scale & 15) * bits - half(block, 82) * (scale >> 4)
        case "Q3_K":
            number = i // 16
            low = block[96 + number % 8] >> 4 * (number // 8) & 15
            scale = (low | (block[104 + number % 4] >> 2 * (number // 4) & 3) << 4) - 32
            bits = block[32 + i // 128 * 32 + inside] >> 2 * (group % 4) & 3
            high = block[inside] >> group & 1
            return half(block, 108) * scale * (bits - (0 if high else 4))
        case "Q4_K":
            scale, minimum = scale_and_minimum(block[4:16], group)
            bits = block[16 + i // 64 * 32 + inside] >> 4 * (group % 2) & 15
            return half(block, 0) * scale * bits - half(block, 2) * minimum
        case "Q5_K":
            scale, minimum = scale_and_minimum(block[4:16], group)
            bits = block[48 + i // 64 * 32 + inside] >> 4 * (group % 2) & 15
            high = block[16 + inside] >> group & 1
            return half(block, 0) * scale * (bits | high << 4) - half(block, 2) * minimum
        case "Q6_K":
            low = block[i // 128 * 64 + i % 64] >> 4 * (i % 128 // 64) & 15
            high = block[128 + i // 128 * 32 + inside] >> 2 * (group % 4) & 3
            scale = int(np.int8(np.uint8(block[192 + i // 16])))
            return half(block, 208) * scale * ((low | high << 4) - 32)
    raise AssertionError(kind)


HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, blocks: int) -> npt.NDArray[np.uint8]:
    """Return bytes ``[rows, bytes]`` whose scales are small finite numbers and whose other bits are random."""
    random = np.random.default_rng(int(kind))
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in HALVES.get(kind.name, (0, 2)):
        scales = random.normal(size=(rows, blocks, 1)).astype(np.float16)
        data[:, :, at : at + 2] = scales.view(np.uint8).reshape(rows, blocks, 2)
    return data.reshape(rows, -1)


def model_file(path: Path, tensors: dict[str, Any], **metadata: Any) -> Path:
    """Write a file with the metadata of a tiny Llama and some tensors."""
    numbers = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 512,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return write_gguf(path, numbers | metadata, tensors)


@pytest.mark.parametrize("kind", [name for name in SUPPORTED if name.startswith("Q")])
def test_quantized_values_are_those_of_the_format(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = random_blocks(number, 3, 512 // block)
    path = model_file(
        tmp_path / "m.gguf", {"token_embd.weight": (data, number), "output_norm.weight": np.ones(512, "f4")}
    )
    tensor = open_checkpoint(str(path)).tensor("model.embed_tokens.weight")
    assert tensor.dtype == torch.float16
    wanted = [
        [value(kind, row[at * size : (at + 1) * size].tobytes(), i) for at in range(512 // block) for i in range(block)]
        for row in data
    ]
    np.testing.assert_allclose(tensor.float().numpy(), np.array(wanted), rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_keep_their_type(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = TinyModel("qwen2", dtype=dtype).save(tmp_path / "folder")
    checkpoint = open_checkpoint(str(convert(folder, tmp_path / "m.gguf", kind=kind)))
    source = CheckpointFolder.open(folder, name="folder")
    weight = checkpoint.tensor("model.layers.1.mlp.up_proj.weight")
    assert weight.dtype == dtype
    assert torch.equal(weight, source.tensor("model.layers.1.mlp.up_proj.weight"))
    assert checkpoint.tensor("model.layers.1.input_layernorm.weight").dtype == torch.float32
    assert not any("quantized before" in line for line in checkpoint.describe())


# ---- Tokenizers.

TEXTS = [
    "Once upon a time, there was a girl.",
    " lead  and trail ",
    "tabs\tand\n\nlines\r\n",
    "Grüße 世界! 🦉",
    "3.14 it's",
    "def f(x):\n\n\n    return   2026 \n<start_of_turn>",
    "",
]


@pytest.fixture(scope="module")
def demo_metadata() -> dict[str, Any]:
    """The demo model's byte-level tokenizer as metadata."""
    document = json.loads((demo_model_path() / "tokenizer.json").read_text())
    vocabulary = sorted(document["model"]["vocab"].items(), key=lambda item: item[1])
    specials = {token["content"] for token in document["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    return tokenizer_metadata(
        [token for token, _ in vocabulary],
        [3 if token in specials else 1 for token, _ in vocabulary],
        model="gpt2",
        pre="gpt-2",
        merges=merges,
        bos_token_id=1,
        eos_token_id=2,
        add_bos_token=True,
    ) | {"tokenizer.chat_template": "{{ messages[0].content }}"}


def test_a_bundle_from_a_file_is_the_bundle_from_the_folder(demo_metadata: dict[str, Any], tmp_path: Path) -> None:
    options = {"vocab_size": len(demo_metadata["tokenizer.ggml.tokens"]), "num_hidden_layers": 1}
    folder = TinyModel("llama", options).save(tmp_path / "folder")
    file = convert(folder, tmp_path / "tiny.gguf", tokenizer=demo_metadata)
    for model in (folder, file):
        config = ExportConfig(
            model=str(model), output=tmp_path / f"{model.name}-pmpd", calibration="none", targets=(), verify=False
        )
        export_bundle(config)
    ours, theirs = (Bundle.open(tmp_path / f"{model.name}-pmpd", verify=True) for model in (file, folder))
    assert (ours.path / "weights.bin").read_bytes() == (theirs.path / "weights.bin").read_bytes()
    assert ours.manifest.source.model == "tiny.gguf"
    assert ours.stop_ids == (2,)
    assert (ours.path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_file_is_calibrated_as_the_folder_is(
    demo_metadata: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"vocab_size": len(demo_metadata["tokenizer.ggml.tokens"]), "num_hidden_layers": 1}
    folder = TinyModel("llama", options).save(tmp_path / "folder")
    file = convert(folder, tmp_path / "tiny.gguf", tokenizer=demo_metadata)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, folder)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("The owl saw a tree and a ball. " * 20)
    other.write_text("A girl had a red hat and a blue coat. " * 20)
    weights = []
    for name, model, calibration in (("a", folder, text), ("b", file, text), ("c", file, other)):
        config = ExportConfig(
            model=str(model), output=tmp_path / name, precisions=(2,), targets=(), verify=False,
            calibration=calibration, calibration_samples=2, calibration_length=16,
        )  # fmt: skip
        export_bundle(config)
        weights.append((tmp_path / name / "weights.bin").read_bytes())
    assert weights[1] == weights[0]
    assert weights[1] != weights[2]


def test_a_skeleton_needs_the_header_alone(tmp_path: Path) -> None:
    folder = TINY_MODELS["qwen2"].save(tmp_path / "folder")
    file = convert(folder, tmp_path / "tiny.gguf")
    plans = [Skeleton.of(ExportConfig(model=str(model), output=tmp_path / "x")).plan for model in (file, folder)]
    assert plans[0].tensors == plans[1].tensors


def test_the_plan_says_that_few_bits_were_few_before(tmp_path: Path) -> None:
    folder = TinyModel(
        "qwen2", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    ).save(tmp_path / "f")
    file = convert(folder, tmp_path / "tiny.gguf", kind="Q4_0")
    plan = "\n".join(Export.prepare(ExportConfig(model=str(file), output=tmp_path / "x", targets=())).describe())
    assert "source    Q4_0, 4.5 bits a weight: it was quantized before; give the original checkpoint" in plan


LLAMA_PIECES: dict[str, Any] = {}
# No space in front, digits one by one, and runs of spaces and lines as words of the user's.
GEMMA_PIECES = {
    "add_dummy_prefix": False,
    "split_digits": True,
    "user_defined_symbols": ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<start_of_turn>"],
}


@pytest.mark.parametrize("options", [LLAMA_PIECES, GEMMA_PIECES], ids=["llama", "gemma"])
def test_a_sentencepiece_vocabulary_tokenizes_as_sentencepiece_does(options: dict[str, Any], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([*TEXTS, *(f"The {a} saw the {b}." for a in ("cat", "owl") for b in ("sun", "sea"))]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",  # this and the next as in Llama's model
        remove_extra_whitespaces=False,
        minloglevel=9,
        **options,
    )
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    pieces = range(model.vocab_size())
    kind = {True: 6}
    types = [kind.get(model.is_byte(i), 2 if model.is_unknown(i) else 3 if model.is_control(i) else 1) for i in pieces]
    words = [model.id_to_piece(i) for i in pieces]
    for word in options.get("user_defined_symbols", ()):
        types[words.index(word)] = 4
        words[words.index(word)] = word.replace("▁", " ")  # as the conversion writes them
    metadata = tokenizer_metadata(
        words,
        types,
        model="llama",
        scores=[float(model.get_score(i)) for i in pieces],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=options.get("add_dummy_prefix", True),
    )
    file = convert(TINY_MODELS["llama"].save(tmp_path / "folder"), tmp_path / "m.gguf", tokenizer=metadata)
    ours = open_checkpoint(str(file)).tokenizer()
    for text in TEXTS:
        assert ours(text).input_ids == [1, *model.encode(text)], text
        assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(("start", "end"), [(True, False), (False, True), (True, True), (False, False)])
def test_start_and_end_tokens_are_added_as_the_metadata_says(
    start: bool, end: bool, demo_metadata: dict[str, Any], tmp_path: Path
) -> None:
    flags = {"tokenizer.ggml.add_bos_token": start, "tokenizer.ggml.add_eos_token": end}
    data = {"token_embd.weight": np.zeros((4, 512), np.float32)}
    checkpoint = open_checkpoint(str(model_file(tmp_path / "m.gguf", data, **demo_metadata | flags)))
    tokenizer = checkpoint.tokenizer()
    plain = tokenizer("Once", add_special_tokens=False).input_ids
    assert plain
    assert tokenizer("Once").input_ids == [*([1] if start else []), *plain, *([2] if end else [])]
    assert tokenizer.eos_token_id == 2


def test_every_token_that_ends_a_turn_stops_a_text(demo_metadata: dict[str, Any], tmp_path: Path) -> None:
    tokens, types = list(demo_metadata["tokenizer.ggml.tokens"]), list(demo_metadata["tokenizer.ggml.token_type"])
    metadata = demo_metadata | {
        "tokenizer.ggml.tokens": [*tokens, "<|im_end|>", "<|eot_id|>", "<end_of_turn>"],
        "tokenizer.ggml.token_type": [*types, 3, 3, 1],
        "tokenizer.ggml.eot_token_id": 7,
    }
    data = {"token_embd.weight": np.zeros((4, 512), np.float32)}
    checkpoint = open_checkpoint(str(model_file(tmp_path / "m.gguf", data, **metadata)))
    assert checkpoint.generation_config() == {"eos_token_id": [2, 7, len(tokens), len(tokens) + 1]}


@pytest.mark.parametrize(
    ("rule", "text", "pieces"),
    [
        ("gpt-2", "it's 123 x", ["it", "'s", "Ġ123", "Ġx"]),
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("qwen2", "it'S 12", ["it", "'S", "Ġ", "1", "2"]),
        ("llama-bpe", "x 12345", ["x", "Ġ", "123", "45"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", "Ġ", "123", "4"]),
        ("hunyuan-dense", "x 12345世界", ["x", "Ġ", "123", "45", "ä¸ĸçķĮ"]),
    ],
)
def test_text_is_split_by_the_rule_of_the_vocabulary(
    rule: str, text: str, pieces: list[str], demo_metadata: dict[str, Any], tmp_path: Path
) -> None:
    data = {"token_embd.weight": np.zeros((4, 512), np.float32)}
    path = model_file(tmp_path / "m.gguf", data, **demo_metadata | {"tokenizer.ggml.pre": rule})
    backend: Backend = open_checkpoint(str(path)).tokenizer().backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces
