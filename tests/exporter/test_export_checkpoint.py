"""Checkpoints: where they are found, and what is refused, in one line and before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import BASE, TINY_MODELS

from pmpd.exporter import Export, ExportConfig, export_bundle
from pmpd.exporter.arch import FAMILIES, read_family
from pmpd.exporter.demo import demo_model_path
from pmpd.exporter.source.models import resolve_model
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.refused import REFUSED
from pmpd.runtime.errors import PmpdError
from pmpd.tvm_kernels.models import MODELS

Damage = Callable[[Path], None]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama"].save(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module")
def whole_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama-linear-sharded"].save(tmp_path_factory.mktemp("sharded") / "tiny")


def refusal(model: Path | str, place: Path, **options: Any) -> str:
    """Export into the empty folder `place`; return the one line of the refusal, which leaves nothing there."""
    place.mkdir(parents=True)
    with pytest.raises(PmpdError) as caught:
        export_bundle(ExportConfig(model=str(model), output=place / "bundle", targets=(), **options))
    assert "\n" not in str(caught.value)
    assert list(place.iterdir()) == []
    return str(caught.value)


def config_with(**changes: Any) -> Damage:
    """Change fields of `config.json`; None removes one."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def tensor_with(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Change a tensor of `model.safetensors`; None removes it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, folder / WEIGHTS)

    return damage


def index_with(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the index of a sharded checkpoint."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(index)))

    return damage


def bytes_with(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def broken(whole: Path, tmp_path: Path, damage: Damage) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize("alias", MODELS)
def test_an_alias_stands_for_a_hub_id(alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model(alias, revision="v1") == tmp_path
    assert (asked["hub_id"], asked["revision"]) == (MODELS[alias].hub_id, "v1")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_the_aliases_of_the_readme_are_there() -> None:
    assert MODELS["phi-1.5"].hub_id == "microsoft/phi-1_5"
    assert {"vicuna-7b", "mobilellama-1.4b", "stablelm-zephyr-3b", "llama3-8b", "longchat-13b"} < MODELS.keys()


def test_a_snapshot_of_the_hub_knows_its_commit(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--somebody--tiny" / "snapshots" / "0123abc"
    shutil.copytree(whole, folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    source = open_checkpoint("somebody/tiny", revision="main").source
    assert (source.model, source.revision) == ("somebody/tiny", "0123abc")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "unknown architecture 'lama': choose one of"),
        ({"model_type": "gemma3n"}, "the architecture 'gemma3n' cannot be exported"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "'own'"),
        ({"model_type": "llama", "quantization_config": {}}, "config.json has quantization_config"),
    ],
    ids=["unknown", "refused", "remote code", "quantized"],
)
def test_a_hub_model_is_refused_before_its_weights_are_fetched(
    config: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, fetched = tmp_path / "snapshot", []

    def download(_: str, *, allow_patterns: list[str], **__: Any) -> str:
        fetched.append(allow_patterns)
        snapshot.mkdir(exist_ok=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert message in refusal("somebody/something", tmp_path / "place")
    assert fetched == [["config.json"]]


def http_error(status: int) -> HfHubHTTPError:
    # The hub's client is on requests or httpx, depending on its version; both have these.
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status} for url\n\nRequest ID: 1", response=response)


@pytest.mark.parametrize(
    "error",
    [
        http_error(404),
        http_error(401),
        HFValidationError("bad name"),
        LocalEntryNotFoundError("no snapshot and no network\nin the cache"),
        ConnectionError("unreachable"),
        OSError(),
    ],
    ids=["unknown", "gated", "invalid", "offline", "connection", "no reason"],
)
def test_a_failing_hub_is_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refusal("somebody/something", tmp_path / "place")
    assert message.startswith("somebody/something cannot be fetched from the Hugging Face hub (")
    assert "give a local folder" in message


def test_demo_and_folders_need_no_hub(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve_model("demo") == demo_model_path()
    assert resolve_model(str(whole)) == whole


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("vicuna7b", "vicuna-7b"), ("phi1.5", "phi-1.5"), ("demos", "demo"), ("stablelm", "stablelm-zephyr-3b")],
)
def test_a_misspelt_alias_lists_the_choices_nearest_first(name: str, nearest: str, tmp_path: Path) -> None:
    message = refusal(name, tmp_path / "place")
    assert message.startswith(f"unknown model '{name}': choose one of {nearest}")
    assert all(alias in message for alias in MODELS)
    assert "a folder" in message


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "~/model", "a/b/c", "", "."])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    assert refusal(name, tmp_path / "place")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "has no config.json"),
        (bytes_with("config.json", lambda data: data[:-9]), "config.json is not valid JSON"),
        (bytes_with("config.json", lambda _: b"[1]"), "config.json is not a JSON object"),
        (bytes_with("config.json", lambda _: b"\xff\xfe"), "config.json is not valid JSON"),
        (config_with(model_type="mamba3"), "unknown architecture 'mamba3': choose one of"),
        (config_with(model_type="mamba2"), "the architecture 'mamba2' cannot be exported: it has Mamba layers"),
        (config_with(model_type=None), "unknown architecture 'None'"),
        (config_with(quantization_config={"quant_method": "gptq"}), "give the floating-point checkpoint"),
        (
            config_with(rope_scaling={"rope_type": "spiral", "factor": 4.0}, rope_parameters=None),
            "unknown rope scaling 'spiral': choose one of",
        ),
        (config_with(rope_scaling={"rope_type": "linear"}, rope_parameters=None), "config.json lacks 'factor'"),
        (config_with(rope_scaling="linear", rope_parameters=None), "rope_scaling must be an object, got 'linear'"),
        (config_with(rope_theta="1e4", rope_parameters=None), "rope_theta must be a number above 0, got '1e4'"),
        (config_with(rms_norm_eps="tiny"), "rms_norm_eps must be a number above 0, got 'tiny'"),
        (config_with(hidden_act="swish-squared"), "unknown hidden_act 'swish-squared': choose one of"),
        (config_with(hidden_size=None), "config.json lacks 'hidden_size'"),
        (without(WEIGHTS), "has no *.safetensors weights"),
        (bytes_with(WEIGHTS, lambda data: data[:-100]), f"{WEIGHTS} cannot be read"),
        (bytes_with(WEIGHTS, lambda data: data[:5]), f"{WEIGHTS} cannot be read"),
        (bytes_with(WEIGHTS, lambda _: b""), f"{WEIGHTS} cannot be read"),
        (bytes_with(WEIGHTS, lambda data: data[:8] + b"#" * 20 + data[28:]), f"{WEIGHTS} cannot be read"),
        (tensor_with("model.layers.1.mlp.up_proj.weight", lambda _: None), "'model.layers.1.mlp.up_proj.weight'"),
        (
            tensor_with("model.layers.0.input_layernorm.weight", lambda _: None),
            "'model.layers.0.input_layernorm.weight'",
        ),
        (tensor_with("model.embed_tokens.weight", lambda _: None), "'model.embed_tokens.weight'"),
        (tensor_with("lm_head.weight", lambda _: None), "'lm_head.weight'"),
        (
            tensor_with("model.layers.0.self_attn.q_proj.weight", lambda w: w.to(torch.int8)),
            "'model.layers.0.self_attn.q_proj.weight' is torch.int8",
        ),
        (tensor_with("model.layers.0.self_attn.k_proj.weight", lambda w: w[:-1]), "self_attn.k_proj.weight"),
        (tensor_with("model.layers.1.mlp.down_proj.weight", lambda w: w[:, :-1]), "mlp.down_proj.weight"),
        (tensor_with("model.layers.1.mlp.down_proj.weight", lambda w: w.flatten()), "mlp.down_proj.weight"),
        (tensor_with("model.norm.weight", lambda w: w[:-1]), "'model.norm.weight'"),
        (tensor_with("model.embed_tokens.weight", lambda w: w[:-1]), "'model.embed_tokens.weight'"),
        (tensor_with("model.embed_tokens.weight", lambda w: w.T), "'model.embed_tokens.weight'"),
    ],
)
def test_a_broken_checkpoint_is_refused_before_work(damage: Damage, message: str, whole: Path, tmp_path: Path) -> None:
    assert message in refusal(broken(whole, tmp_path, damage), tmp_path / "place")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "model-00002-of-"),
        (lambda folder: os.truncate(sorted(folder.glob("*.safetensors"))[1], 1000), "model-00002-of-"),
        (index_with(lambda index: index["weight_map"]), "weight_map"),
        (index_with(lambda index: {"weight_map": list(index["weight_map"])}), "weight_map"),
        (index_with(lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 1)}), "weight_map"),
        (index_with(lambda index: [index]), f"{INDEX} is not a JSON object"),
        (bytes_with(INDEX, lambda data: data[:-3]), f"{INDEX} is not valid JSON"),
    ],
    ids=["missing shard", "cut shard", "no weight_map", "list", "numbers", "no object", "cut"],
)
def test_a_broken_index_is_refused_before_work(
    damage: Damage, message: str, whole_sharded: Path, tmp_path: Path
) -> None:
    assert message in refusal(broken(whole_sharded, tmp_path, damage), tmp_path / "place")


@pytest.mark.parametrize("escape", ["../{}", "{root}/{}", "sub/../../{}"])
def test_a_shard_outside_the_checkpoint_is_refused(escape: str, whole_sharded: Path, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0].name
        (folder / "sub").mkdir()
        shutil.copy(folder / shard, folder.parent)
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace(shard, escape.format(shard, root=folder.parent)))

    message = refusal(broken(whole_sharded, tmp_path, damage), tmp_path / "place")
    assert INDEX in message


def test_an_index_that_names_the_wrong_shard_is_refused(whole_sharded: Path, tmp_path: Path) -> None:
    def swap(index: dict[str, Any]) -> dict[str, Any]:
        shards = index["weight_map"]
        shards["lm_head.weight"] = shards["model.layers.0.mlp.up_proj.weight"]
        return index

    assert "lm_head.weight" in refusal(broken(whole_sharded, tmp_path, index_with(swap)), tmp_path / "place")


def test_pickled_weights_are_refused_with_the_way_out(whole: Path, tmp_path: Path) -> None:
    def pickle(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "pytorch_model.bin")

    message = refusal(broken(whole, tmp_path, pickle), tmp_path / "place")
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            float("nan"),
            "'model.layers.1.mlp.up_proj.weight': weight [5, 7] is nan",
        ),
        ("model.layers.1.mlp.up_proj.weight", -float("inf"), "mlp.up_proj.weight': weight [5, 7] is -inf"),
        ("model.layers.1.mlp.up_proj.weight", 1e6, "mlp.up_proj.weight': weight [5, 7] is 1000000.0"),
        ("model.embed_tokens.weight", float("nan"), "'model.embed_tokens.weight': weight [5, 7] is nan"),
        ("model.embed_tokens.weight", 1e6, "'model.embed_tokens.weight': weight [5, 7] is 1000000.0"),
        ("model.norm.weight", float("nan"), "tensor 'model.norm.weight' [5] is nan in float32"),
    ],
)
def test_a_weight_that_is_no_number_is_named(
    name: str, value: float, message: str, whole: Path, tmp_path: Path
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[(5, 7)[: tensor.ndim]] = value
        return tensor

    folder = broken(whole, tmp_path, tensor_with(name, spoil))
    with pytest.raises(PmpdError) as caught:
        export_bundle(ExportConfig(model=str(folder), output=tmp_path / "bundle", targets=()))
    assert message in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_the_supported_architectures_are_listed() -> None:
    with pytest.raises(PmpdError) as caught:
        read_family({"model_type": "lama"})
    assert str(caught.value).startswith("config.json: unknown architecture 'lama': choose one of llama")
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "qwen3_5"}, "the architecture 'qwen3_5' cannot be exported: its linear attention"),
        ({"model_type": "gemma3n"}, "the architecture 'gemma3n' cannot be exported: its per-layer embeddings"),
        ({"model_type": "lfm2"}, "the architecture 'lfm2' cannot be exported: its short convolutions have a state"),
        ({"model_type": "lfm2_moe"}, "the architecture 'lfm2_moe' cannot be exported: its short convolutions"),
        ({"model_type": "gemma4_text"}, "the architecture 'gemma4_text' cannot be exported: its heads differ in size"),
        ({"model_type": "granitemoehybrid"}, "the architecture 'granitemoehybrid' cannot be exported: it has Mamba"),
        ({"model_type": "qwen3_moe"}, "the architecture 'qwen3_moe' cannot be exported: it is a mixture of experts"),
        ({"model_type": "bert"}, "the architecture 'bert' cannot be exported: it is an encoder"),
        ({"model_type": "gpt2"}, "the architecture 'gpt2' cannot be exported: it has learned position embeddings"),
        (
            {"model_type": "mistral3", "vision_config": {}, "text_config": {}},
            "the architecture 'mistral3' cannot be exported: it reads images or sound as well as text",
        ),
        (
            {"model_type": "mobilellm", "auto_map": {"AutoConfig": "configuration_mobilellm.MobileLLMConfig"}},
            "the architecture 'mobilellm' cannot be exported: it needs code of its repository, which is never run",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "the model LlamaForSequenceClassification has no output layer for text: give a model for causal",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_an_architecture_that_cannot_be_exported_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(PmpdError) as caught:
        read_family(config)
    assert str(caught.value).startswith(f"config.json: {reason}")
    assert "\n" not in str(caught.value)


def test_no_supported_architecture_is_in_the_table_of_refusals() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("length", [0, -1, BASE["max_position_embeddings"] + 1])
def test_a_context_beyond_the_model_is_refused(length: int, whole: Path, tmp_path: Path) -> None:
    message = refusal(whole, tmp_path / "place", context_length=length)
    assert message == f"context length {length}: the model allows 1 to 64"


def test_a_tensor_is_read_only_when_it_is_asked_for(whole_sharded: Path, tmp_path: Path) -> None:
    """Opening a sharded checkpoint needs its index alone, so a damaged shard shows when it is read."""
    folder = broken(whole_sharded, tmp_path, lambda _: None)
    checkpoint = open_checkpoint(str(folder))
    shard = checkpoint.shards["lm_head.weight"]
    shard.write_bytes(b"damaged")
    with pytest.raises(PmpdError, match=f"{shard.name} cannot be read"):
        checkpoint.tensor("lm_head.weight")
    other = next(name for name, file in checkpoint.shards.items() if file != shard)
    assert checkpoint.tensor(other).is_floating_point()


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Tiny", "apache-2.0"),
        ("---\ntags: [x]\n---\nlicense: mit", None),
        ("license: mit", None),
        ("---\nlicense:\n---", None),
        ("---\nlicense: 'mit'  # as upstream\n---", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---", "mit, apache-2.0"),
        ("---\nlicense: [\n---", None),
        ("---\nlicense: 4\n---", None),
        ("", None),
    ],
)
def test_the_licence_comes_from_the_model_card(card: str, wanted: str | None, whole: Path, tmp_path: Path) -> None:
    folder = broken(whole, tmp_path, lambda folder: (folder / "README.md").write_text(card) and None)
    assert open_checkpoint(str(folder)).source.license == wanted


def test_planning_writes_nothing(whole: Path, tmp_path: Path) -> None:
    export = Export.prepare(ExportConfig(model=str(whole), output=tmp_path / "bundle"))
    assert any("2 layers" in line for line in export.describe())
    assert list(tmp_path.iterdir()) == []
