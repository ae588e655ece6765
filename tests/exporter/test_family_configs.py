"""How families read `config.json`: defaults of their own, windows, what cannot be exported."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny_models import BASE, GRANITE_MULTIPLIERS, MINISTRAL3_ROPE, longrope

from pmpd.exporter.arch import Family, read_family
from pmpd.exporter.nn import LinearScaling, LongRopeScaling, NtkScaling, PositionScale, Rotary
from pmpd.exporter.source.reference import transformers_config
from pmpd.runtime import PmpdError

WINDOW = {"sliding_window": 16}
CONTEXT = BASE["max_position_embeddings"]


def family(model_type: str, context_length: int | None = None, **changes: Any) -> Any:
    config = {key: value for key, value in {**BASE, **changes}.items() if value != "absent"}
    return read_family({"model_type": model_type, **config}, context_length=context_length)


def refusal(model_type: str, **changes: Any) -> str:
    with pytest.raises(PmpdError) as caught:
        family(model_type, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "tied", "theta", "head_dim", "epsilon"),
    [
        ("llama", False, 1e4, 16, 1e-6),
        ("qwen2", False, 1e4, 16, 1e-6),
        ("qwen3", False, 1e4, 128, 1e-6),
        ("smollm3", True, 2e6, 16, 1e-6),
        ("granite", False, 1e4, 16, 1e-6),
        ("hunyuan_v1_dense", False, 1e4, 16, 1e-5),
        ("phi3", False, 1e4, 16, 1e-5),
        ("olmo2", False, 1e4, 16, 1e-5),
        ("olmo3", False, 5e5, 16, 1e-5),
        ("gemma", True, 1e4, 256, 1e-6),
        ("gemma2", True, 1e4, 256, 1e-6),
        ("gemma3_text", True, 1e6, 256, 1e-6),
    ],
)
def test_what_a_configuration_leaves_out_has_the_defaults_of_transformers(
    model_type: str, tied: bool, theta: float, head_dim: int, epsilon: float
) -> None:
    read: Family = family(model_type)
    rotary = read.shape.head.rotary
    assert rotary is not None
    assert (read.shape.tied_embeddings, rotary.theta, read.shape.head.size) == (tied, theta, head_dim)
    assert read.norm_epsilon == epsilon


def test_a_window_that_cuts_nothing_off_changes_nothing() -> None:
    assert family("mistral", **WINDOW, context_length=16).windows == (None, None)
    assert family("mistral", sliding_window=None).windows == (None, None)
    assert family("phi3").windows == (None, None)
    assert family("mistral", sliding_window=CONTEXT).windows == (None, None)
    assert family("ministral", **WINDOW, layer_types=["full_attention"] * 2).windows == (None, None)
    # What published Qwen2 models say: a window that is not used.
    unused = {"use_sliding_window": False, "max_window_layers": 0}
    assert family("qwen2", **WINDOW, **unused).windows == (None, None)
    assert family("qwen3", **WINDOW, use_sliding_window=True).windows == (None, None)  # from layer 28 on
    assert family("smollm3", **WINDOW, use_sliding_window=True).windows == (None, None)  # of layers without rotation


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("mistral", {}, (16, 16)),
        ("ministral", {"layer_types": ["full_attention", "sliding_attention"]}, (None, 16)),
        ("phi3", {}, (16, 16)),
        ("olmo3", {"num_hidden_layers": 5}, (16, 16, 16, None, 16)),
        ("olmo3", {"layer_types": ["full_attention", "sliding_attention"]}, (None, 16)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (None, 16)),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, (16, None)),
        ("smollm3", {"use_sliding_window": True, "no_rope_layers": [1, 0]}, (None, 16)),
        ("gemma2", {}, (16, None)),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, (None, 16)),
        ("gemma3_text", {}, (16, 16)),  # the sixth is the first to see all
        ("gemma3_text", {"sliding_window_pattern": 2}, (16, None)),
    ],
)
def test_layers_may_have_windows(model_type: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert family(model_type, **WINDOW, **changes).windows == windows


def test_all_layers_of_ministral3_have_the_window() -> None:
    assert family("ministral3", **WINDOW, rope_parameters=MINISTRAL3_ROPE).window == 16


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0.5}, "sliding_window must be a whole number of 1 or more, got 0.5"),
        ("ministral", {"layer_types": ["full_attention"]}, "layer_types must have a name for 2 layers, got ['full_"),
        ("qwen2", {"layer_types": ["full_attention", "ring"]}, "unknown kind of layer 'ring': choose one of full"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be 2 times 0 or 1, got [1]"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers must be 2 times 0 or 1, got [1, 2]"),
        ("granite", {"logits_scaling": -8.0}, "logits_scaling must be a number above 0, got -8.0"),
        ("llama", {"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
        ("ministral3", {}, "rope_parameters of ministral3 must have llama_4_scaling_beta"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number above 0, got 0"),
        ("gemma2", {"hidden_activation": "swish"}, "unknown hidden_act 'swish'"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a whole number of 1 or more"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends to tokens that come later"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 0.0, "beta_fast": -1}},
            "beta_fast must be a number",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(model_type: str, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(model_type, **changes)


def test_layers_without_rotation_have_a_layout_of_their_own() -> None:
    assert family("smollm3", num_hidden_layers=5).rotated == (True, True, True, False, True)
    assert family("smollm3", no_rope_layer_interval=2).rotated == (True, False)


def test_multipliers_are_read() -> None:
    granite = family("granite", **GRANITE_MULTIPLIERS)
    assert (granite.embedding_scale, granite.attention_multiplier) == (12.0, 0.2)
    assert (granite.residual_multiplier, granite.logits_scaling) == (0.22, 8.0)


def test_only_layers_of_olmo3_without_a_window_have_its_rope_scaling() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    old = family("olmo3", num_hidden_layers=4, rope_theta=500.0, rope_scaling=scaling)
    kinds = {"sliding_attention": {"rope_theta": 500.0}, "full_attention": {"rope_theta": 500.0, **scaling}}
    assert old.layouts == family("olmo3", num_hidden_layers=4, rope_parameters=kinds).layouts
    assert [layout.rotary.scaling is not None for layout in old.layouts] == [False, False, False, True]
    assert {layout.rotary.theta for layout in old.layouts} == {500.0}


def test_queries_grow_only_beyond_the_original_context() -> None:
    assert family("ministral3", rope_parameters=MINISTRAL3_ROPE).query_scale == PositionScale(0.1, 16)
    assert family("ministral3", rope_parameters=MINISTRAL3_ROPE, context_length=16).query_scale is None


def test_the_base_of_hunyuan_is_stretched_by_a_constant() -> None:
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    for key in ("rope_scaling", "rope_parameters"):
        assert family("hunyuan_v1_dense", **{key: scaling}).shape.head.rotary.scaling == NtkScaling(1000.0)
    assert family("hunyuan_v1_dense").shape.head.rotary.scaling is None


LONGROPE = longrope(8, original=16, longest=64)


def test_a_model_with_longrope_has_its_original_context_by_default() -> None:
    default, whole = family("phi3", **LONGROPE), family("phi3", 64, **LONGROPE)
    assert (default.shape.context_length, whole.shape.context_length) == (16, 64)
    magnitude = pytest.approx((1 + math.log(4) / math.log(16)) ** 0.5)
    for read, kind in ((default, "short"), (family("phi3", 8, **LONGROPE), "short"), (whole, "long")):
        scaling = read.shape.head.rotary.scaling
        factors = tuple(LONGROPE["rope_scaling"][f"{kind}_factor"])
        assert scaling == LongRopeScaling(factors, scaling.attention_factor)
        assert scaling.attention_factor == magnitude
        (line,) = read.describe()
        assert f"LongRoPE's {kind} factors" in line
    assert "--context-length up to 64 takes the long ones" in default.describe()[0]
    assert "as transformers for texts of more than 16 tokens" in whole.describe()[0]
    assert family("phi3").describe() == []


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_all_names_and_places_of_longrope_are_read(kind: str) -> None:
    scaling = LONGROPE["rope_scaling"]
    old = family("phi3", **LONGROPE | {"rope_theta": 500.0, "rope_scaling": {**scaling, "type": kind}})
    parameters = {**scaling, "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 16}
    assert old == family("phi3", rope_parameters=parameters, max_position_embeddings=64)


@pytest.mark.parametrize("factors", [None, [1.0] * 7, [1.0] * 7 + [0.0], "12345678"])
def test_factors_that_do_not_fit_are_refused(factors: object) -> None:
    scaling = {**LONGROPE["rope_scaling"], "short_factor": factors}
    assert "config.json: short_factor must be" in refusal("phi3", **LONGROPE | {"rope_scaling": scaling})


def test_the_first_gemmas_say_gelu_and_mean_its_approximation() -> None:
    assert family("gemma", hidden_act="gelu").activation == "gelu_pytorch_tanh"
    assert family("gemma", hidden_act="gelu", hidden_activation="gelu_new").activation == "gelu_new"
    for name in ("gelu", "gelu_pytorch_tanh"):  # transformers 4.57 takes the first at its word
        assert transformers_config({"model_type": "gemma", "hidden_act": name}).hidden_act == "gelu_pytorch_tanh"
    assert family("gemma2", hidden_activation="gelu").activation == "gelu"
    assert family("gemma2", hidden_act="gelu").activation == "gelu_pytorch_tanh"  # not what Gemma 2 reads


def test_softcaps_have_defaults_and_null_means_none() -> None:
    capped, uncapped = family("gemma2"), family("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (capped.attention_softcap, capped.logits_softcap) == (50.0, 30.0)
    assert (uncapped.attention_softcap, uncapped.logits_softcap) == (None, None)
    assert family("gemma3_text").logits_softcap is None
    assert family("gemma3_text", final_logit_softcapping=20.0).logits_softcap == 20.0


def test_gemma3_rotates_layers_with_a_window_by_a_base_of_their_own() -> None:
    """As transformers 4 and 5 write it, and as published models leave most of it out."""
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 5e5, **scaling},
            "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
        }
    }
    for options in (old, new):
        full, sliding = family("gemma3_text", sliding_window_pattern=2, **options).layouts[::-1]
        assert full.rotary == Rotary(256, 5e5, LinearScaling(8.0))
        assert sliding.rotary == Rotary(256, 2e4)
    # A window that cuts nothing off changes nothing of the rotation.
    short = family("gemma3_text", **WINDOW, context_length=16)
    assert short.windows == (None, None)
    assert [layout.rotary.theta for layout in short.layouts] == [1e4, 1e4]


def test_gemma3_has_the_sizes_that_published_configurations_leave_out() -> None:
    sizes = ("vocab_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    shape = family("gemma3_text", **dict.fromkeys(sizes, "absent")).shape
    assert (shape.vocab_size, shape.heads, shape.kv_heads, shape.context_length) == (262_208, 8, 4, 131_072)
