"""Every architecture family computes what transformers computes, in few nodes and small files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import BASE, FAMILIES, LLAMA3_SCALING, TINY_MODELS, TinyModel, plain_logits, plain_model, random_ids
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pmpd.exporter import Export, ExportConfig, export_bundle
from pmpd.exporter.arch import Decoder, read_family
from pmpd.exporter.arch.reading import read_rotary
from pmpd.exporter.bundle.plan import external_tensor, plan_weights
from pmpd.exporter.nn import BitplaneEmbedding, BitplaneLinear, HeadLayout, Rotary, RotaryTables
from pmpd.exporter.onnx_model import Phase, build_graph
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.verify.dequantized import checkpoint_weights
from pmpd.exporter.verify.float_graph import FloatGraph
from pmpd.exporter.verify.reference import reference_logits
from pmpd.runtime import Bundle, Generator
from pmpd.runtime.format.bitplanes import dequantize

pytestmark = pytest.mark.full

POSITIONS = 48
NODES_PER_LAYER = {
    **{"llama": 12, "llama-biases": 12, "qwen2": 12, "qwen3": 20, "smollm3": 12, "mistral": 12, "granite": 12},
    **{"hunyuan": 22, "phi": 9, "phi3": 12, "olmo2": 18, "stablelm": 12, "gemma": 12, "gemma2": 14, "gemma3": 22},
}
# Shapes of a billion parameters and more: what `config.json` of TinyLlama, Qwen3-0.6B, Phi-1.5 … say.
LARGE = {
    "llama": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
    "qwen3": {
        **{"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
        "head_dim": 128,
    },
    "hunyuan_v1_dense": {
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 4},
        "head_dim": 128,
    },
    "phi": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32},
    "stablelm": {"hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32, "num_key_value_heads": 32},
}


def assert_same(logits: np.ndarray, reference: np.ndarray) -> None:
    """Every position ``[T, V]`` points the same way and has the same most likely token, near ties aside."""
    a, b = logits.astype(np.float64), reference.astype(np.float64)
    assert a.shape == b.shape
    assert ((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() >= 0.99999
    best, second = np.sort(b, axis=1)[:, :-3:-1].T
    clear = best - second > np.abs(a - b).max()  # the KV cache is float16
    assert clear.mean() > 0.9
    assert (a.argmax(axis=1) == b.argmax(axis=1))[clear].all()


def network(config: dict[str, Any], *, precision: int = 4) -> Decoder:
    linear = partial(BitplaneLinear, precision=precision)
    head = partial(BitplaneLinear, precision=6, nested=False)
    return read_family(config).decoder(linear, head, partial(BitplaneEmbedding, precision=6))


def node_count(config: dict[str, Any]) -> int:
    return len(build_graph(network(config), phase="decode", producer="").graph)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_float_graph_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(TINY_MODELS[name].save(tmp_path)))
    family = read_family(checkpoint.config)
    ids = random_ids(family.shape.vocab_size, POSITIONS)
    assert_same(FloatGraph(checkpoint, family).logits(ids), plain_logits(plain_model(tmp_path), ids))


def test_a_longer_context_of_longrope_takes_the_long_factors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(TINY_MODELS["phi3-longrope"].save(tmp_path)))
    family = read_family(checkpoint.config, context_length=100)
    model, graph = plain_model(tmp_path), FloatGraph(checkpoint, family)
    ids = random_ids(family.shape.vocab_size, 100)
    assert_same(graph.logits(ids), plain_logits(model, ids))
    # What the verification compares short texts with: transformers with the long factors alone.
    short = ids[:32]
    reference = reference_logits(
        family.reference_config(checkpoint.config), checkpoint_weights(checkpoint, family), np.array([short])
    )
    assert_same(graph.logits(short), reference[0])
    with pytest.raises(AssertionError):
        assert_same(graph.logits(short), plain_logits(model, short))
    output = tmp_path / "bundle"
    manifest = export_bundle(
        ExportConfig(model=str(tmp_path), output=output, context_length=100, precisions=(8,), targets=())
    )
    assert (manifest.verified, manifest.context_length) == (True, 100)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_of_gemma3_with_images_is_a_gemma3(prefix: str, tmp_path: Path) -> None:
    """As transformers names its tensors since 4.52 and did before; what reads images is left alone."""
    text = TINY_MODELS["gemma3"]
    text.save(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    tensors = {name.replace("model.", prefix): checkpoint.tensor(name) for name in checkpoint.shards}
    save_file(tensors | {"model.vision_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    vision = dict.fromkeys(sizes, 2) | {"image_size": 4}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text.config()}))
    whole = open_checkpoint(str(tmp_path))
    family = read_family(whole.config)
    assert family == read_family(checkpoint.config)
    assert ("text model alone" in " ".join(whole.describe()), checkpoint.describe()) == (True, [])
    for name in checkpoint.shards:
        torch.testing.assert_close(whole.tensor(name), tensors[name.replace("model.", prefix)])
    ids = random_ids(family.shape.vocab_size, POSITIONS)
    assert_same(FloatGraph(whole, family).logits(ids), plain_logits(plain_model(tmp_path), ids))


def test_the_catalogue_has_a_sharded_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(TINY_MODELS["llama-linear-sharded"].save(tmp_path)))
    assert len(set(checkpoint.shards.values())) > 2


NESTED = {"precisions": (4, 2)}
GROUPED = {"precisions": (8, 5, 1), "parent": 8, "groups": 3, "head_precision": 8}
GROUPED_UNTIED = {**GROUPED, "embedding_precision": 8}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, NESTED) for name in ("llama-tied-bfloat16", "qwen2", "qwen3-odd", "smollm3", "mistral")),
        *((name, NESTED) for name in ("granite-biases", "hunyuan-odd", "ministral3", "phi-qk-norm", "stablelm")),
        *((name, NESTED) for name in ("phi3", "phi3-longrope", "phi-qk-norm-odd", "olmo2-odd", "olmo3")),
        *((name, NESTED) for name in ("gemma", "gemma2", "gemma2-uncapped", "gemma3", "gemma3-odd")),
        *((name, GROUPED) for name in ("llama-tied-bfloat16", "granite", "gemma2")),
        *((name, GROUPED_UNTIED) for name in ("phi-qk-norm", "stablelm")),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value["precisions"])),
)
def test_decode_graphs_compute_with_the_dequantized_weights(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = TINY_MODELS[name].save(tmp_path / name)
    export = Export.prepare(ExportConfig(model=str(folder), output=tmp_path / "bundle", targets=(), **options))
    export.run()
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    generator = Generator(bundle)
    ids = random_ids(bundle.manifest.architecture.vocab_size, POSITIONS)
    for precision in options["precisions"]:
        generator.reset()
        logits = generator.decode(ids, precision=precision)
        assert_same(logits, plain_logits(dequantized_model(folder, bundle, export, precision), ids))
        if precision == 8:
            # With at least as many codes as a row has weights, only the rounding to float16 is lost.
            original = plain_logits(plain_model(folder), ids)
            np.testing.assert_allclose(logits, original, atol=0.05)


def dequantized_model(folder: Path, bundle: Bundle, export: Export, precision: int) -> Any:
    """Load the checkpoint in transformers and put the bundle's weights at `precision` bits in the place of its own."""
    model = plain_model(folder)
    state = {}
    assert (export.plan.embedding is None) == model.config.tie_word_embeddings  # a tied one is the head's
    for layer in export.plan.layers:
        bits = precision if layer.module.nested else layer.parent
        planes = bundle.tensor(export.plan.tensors[f"{layer.name}.planes"], planes=bits)
        codebook = bundle.tensor(export.plan.tensors[f"{layer.name}.codebook.{bits}"])
        for name, weight in layer.unstack(dequantize(planes, codebook, layer.module.in_features)).items():
            state["lm_head.weight" if layer.name == "head_proj" else name] = torch.from_numpy(weight)
    missing = model.load_state_dict(state, strict=False).unexpected_keys
    assert not missing
    return model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_merged_layers_come_apart_again(name: str) -> None:
    model = TINY_MODELS[name]
    random = np.random.default_rng(0)
    for layer in plan_weights(network(model.config()), (4, 3, 2), 4).layers:
        module = layer.module
        tensors = {
            tensor: random.normal(size=(part.rows, module.source_features)).astype(np.float32)
            for tensor, part in zip(layer.weight_names, module.parts, strict=True)
        }
        parts = enumerate(layer.weight_names)
        merged = np.concatenate([layer.part_weight(part, tensors[tensor]) for part, tensor in parts])
        assert merged.shape == (module.out_features, module.in_features)
        apart = layer.unstack(merged)
        assert apart.keys() == tensors.keys()
        for tensor, array in tensors.items():
            np.testing.assert_allclose(apart[tensor], array, rtol=3e-7)  # where a multiplier is folded in


@pytest.mark.parametrize("name", NODES_PER_LAYER)
def test_a_layer_has_few_nodes(name: str) -> None:
    two, three = (node_count(TINY_MODELS[name].config(num_hidden_layers=layers)) for layers in (2, 3))
    assert three - two <= NODES_PER_LAYER[name]


@pytest.mark.filterwarnings("ignore")  # tracing has much to say
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_optimum_exports_more_nodes(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        pytest.skip(f"needs the extra `baseline`: {error}")
    folder = TINY_MODELS[name].save(tmp_path / "model")
    main_export(str(folder), tmp_path / "onnx", task="text-generation-with-past", no_post_process=True)
    theirs = len(onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node)
    assert 10 * node_count(TINY_MODELS[name].config()) < theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_graph_of_24_layers_is_a_small_file(family: str, phase: Phase) -> None:
    qk_norm = {"qk_layernorm": True} if family in ("phi", "stablelm") else {}
    sizes = {"num_hidden_layers": 24, "vocab_size": 50304, "max_position_embeddings": 4096, **LARGE[family], **qk_norm}
    decoder = network(TinyModel(family).config(**sizes))
    plan = plan_weights(decoder, (4, 3, 2), 4)
    model = build_graph(decoder, phase=phase, producer="pmpd")
    for name, value in model.graph.initializers.items():
        if name in plan.tensors:
            value.const_value = external_tensor(plan.tensors[name], planes=4)
    assert len(ir.to_proto(model).SerializeToString()) < 2_000_000


def assert_rotates_like_transformers(config: LlamaConfig, dim: int) -> None:
    rotary = read_rotary(config.to_dict(), dim)
    theirs = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(rotary.frequencies(), theirs.inv_freq.numpy(), rtol=1e-4)
    positions = config.max_position_embeddings
    tables = RotaryTables(HeadLayout(dim, rotary), positions)
    wanted = theirs(torch.zeros(1), torch.arange(positions)[None])
    for table, want in zip((tables.cos, tables.sin), wanted, strict=True):
        np.testing.assert_allclose(table.const_value.numpy()[:, : dim // 2], want[0, :, : dim // 2].numpy(), atol=1e-2)


@given(
    pairs=st.integers(2, 32),
    theta=st.floats(10.0, 1e6),
    scaling=st.one_of(
        st.none(),
        st.builds(lambda factor: {"rope_type": "linear", "factor": factor}, st.floats(1.0, 32.0)),
        st.builds(
            lambda factor, low, width, original: {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": low + width,
                "original_max_position_embeddings": original,
            },
            *(st.floats(1.0, 32.0), st.floats(0.5, 4.0), st.floats(0.5, 8.0), st.integers(16, 8192)),
        ),
        # Unchanged within the longest text that the checkpoint allows.
        st.builds(lambda factor: {"rope_type": "dynamic", "factor": factor}, st.floats(1.0, 32.0)),
        st.builds(
            lambda factor, original, options: {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                **options,
            },
            *(st.floats(1.0, 32.0), st.integers(16, 8192)),
            st.sampled_from(
                [
                    {},
                    {"attention_factor": 1.5},
                    {"mscale": 1.0, "mscale_all_dim": 0.5},
                    {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
                ]
            ),
        ),
    ),
)
def test_rotary_tables_are_those_of_transformers(pairs: int, theta: float, scaling: dict[str, Any] | None) -> None:
    options = BASE | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2 * pairs}
    assert_rotates_like_transformers(LlamaConfig(**options, rope_theta=theta, rope_scaling=scaling), 2 * pairs)


@pytest.mark.parametrize(
    ("config", "same_as"),
    [
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        (  # LongChat's own config.json says "type"
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
            {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}},
        ),
        ({"rope_scaling": None}, {}),
    ],
)
def test_both_ways_to_write_rotary_settings_are_read(config: dict[str, Any], same_as: dict[str, Any]) -> None:
    assert read_rotary(config, 16) == read_rotary(same_as, 16)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_both_ways_to_write_the_rotated_share_are_read(family: str) -> None:
    config = {**BASE, "model_type": family, "hidden_size": 240}
    old = read_family({**config, "partial_rotary_factor": 0.4})
    new = read_family({**config, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}})
    assert old == new
    assert old.shape.head.rotary.dim == 32
    assert read_family(config).shape.head.rotary.dim == {"phi": 40, "stablelm": 20}[family]


@given(st.integers(1, 200), st.integers(1, 100))
def test_a_head_layout_moves_elements_and_loses_none(size: int, half: int) -> None:
    half = min(half, size // 2)
    layout = HeadLayout(size, Rotary(2 * half, 10000.0))
    assert layout.slots % 16 == 0
    assert layout.pairs % 8 == 0
    for slots in layout.rotated(), layout.plain():
        assert len(slots) == layout.slots
        assert sorted(slot for slot in slots if slot >= 0) == list(range(size))
    # GroupQueryAttention rotates slot i with slot i + pairs.
    rotated = layout.rotated()
    assert [(rotated[i], rotated[layout.pairs + i]) for i in range(half)] == [(i, half + i) for i in range(half)]
