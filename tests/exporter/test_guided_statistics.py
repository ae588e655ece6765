"""The statistics of the method `guided`, against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import TINY_MODELS, plain_model, save_with_tokenizer

from pmpd.exporter import Export, ExportConfig
from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.calibrate.guided import packed, unpacked
from pmpd.exporter.calibrate.sweep import Visit, fast_dtype, sweep
from pmpd.exporter.calibrate.text import text_tokens
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.reference import load_model

Array = npt.NDArray[Any]


def moments(columns: int, seed: int = 0, tokens: int = 200) -> Array:
    """Return second moments ``[K, K]`` of inputs that are correlated, and larger in some columns."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))
    inputs *= rng.exponential(1, columns)
    return (inputs.T @ inputs / tokens).astype(np.float32)


def test_blocks_may_be_of_the_checkpoints_type(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(TINY_MODELS["llama-tied-bfloat16"].save(tmp_path / "model")))
    ids = torch.randint(0, checkpoint.config["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))
    sums = []
    for model in (load_model(checkpoint), load_model(checkpoint, blocks_as_stored=True)):
        types = {parameter.dtype for parameter in model.parameters()}
        seen: dict[str, torch.Tensor] = {}

        def visit(index: int, seen: dict[str, torch.Tensor] = seen) -> Visit:
            return lambda layer, x, gradient: seen.update({f"{index}.{layer}": x.sum() + gradient.abs().sum()})

        sweep(model, [ids], visit, dtype=torch.float32)
        assert {parameter.dtype for parameter in model.parameters()} == types, "it comes back as it was"
        sums.append((types, seen))
    (types, whole), (stored_types, stored) = sums
    assert (types, stored_types) == ({torch.float32}, {torch.float32, torch.bfloat16})
    assert whole == stored


@pytest.mark.parametrize("name", ["llama", "llama-biases", "gemma3-windows", "qwen3", "phi", "phi3"])
def test_a_sweep_sees_what_one_pass_over_the_whole_model_sees(name: str, tmp_path: Path) -> None:
    if name not in TINY_MODELS:
        name = next(other for other in TINY_MODELS if other.startswith(name.partition("-")[0]))
    model = plain_model(TINY_MODELS[name].save(tmp_path / "model"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.randint(0, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))

    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def visit(index: int) -> Visit:
        def add(layer: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
            seen.setdefault(f"model.layers.{index}.{layer}", []).append((x, gradient))

        return add

    sweep(model, list(ids.split(2)), visit, dtype=torch.float32)  # type: ignore[no-untyped-call]

    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for layer, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):

            def keep(_: Any, x: Any, y: torch.Tensor, layer: str = layer) -> None:
                y.retain_grad()
                inputs[layer], outputs[layer] = x[0].detach(), y

            module.register_forward_hook(keep)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
    logits = model(input_ids=ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert seen.keys() == inputs.keys()
    for layer, parts in seen.items():
        x, gradient = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        assert outputs[layer].grad is not None
        torch.testing.assert_close(x, inputs[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, outputs[layer].grad, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(block).__name__ for block in model.model.layers] != ["_StandIn"] * len(model.model.layers)


def test_moments_are_kept_in_half_the_bytes() -> None:
    H = moments(50)
    H[7], H[:, 7] = 0, 0  # an input that is always zero
    array = packed(H)
    assert array.dtype == np.float16
    deviations = np.sqrt(H.diagonal())
    assert np.abs(unpacked(array) - H).max() < 2e-3 * np.outer(deviations, deviations).max()
    np.testing.assert_allclose(unpacked(array).diagonal(), H.diagonal(), rtol=2e-3)


@pytest.mark.parametrize("widest", [5120, 24])
def test_both_factors_are_kept(widest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pmpd.exporter.calibrate.guided.WIDEST", widest)
    model = save_with_tokenizer(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The owl saw a tree and a ball. " * 40)
    config = ExportConfig(
        model=str(model), output=tmp_path / "bundle", targets=(), calibration=text, calibration_samples=3,
        calibration_length=16,
    )  # fmt: skip
    export = Export.prepare(config)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def visit(index: int) -> Visit:
        return lambda layer, x, g: seen.update({f"model.layers.{index}.{layer}.weight": (x[:, 1:], g[:, 1:])})

    tokens = text_tokens(text, export.checkpoint.tokenizer())
    ids = torch.cat(calibration_batches(tokens, 3, 16))
    sweep(load_model(export.checkpoint), [ids], visit, dtype=fast_dtype())
    statistics = export.statistics()
    assert statistics is not None
    for layer in export.plan.linears:
        for part, name in enumerate(layer.weight_names):
            known = statistics.of(layer, part)
            if name not in seen:
                assert known == {}, "of the output layer there are none"
                continue
            x, gradient = (array.float().flatten(0, 1).double() for array in seen[name])
            mean = gradient.square().mean(1)
            index = layer.module.parts[part].index or slice(None)
            B = (gradient.T @ gradient)[index][:, index].numpy()
            H = (x.T @ (mean[:, None] * x)).numpy()
            H = H if layer.module.columns is None else H[np.ix_(layer.module.columns, layer.module.columns)]
            pairs = [(known["guided"], H)]
            if len(B) <= widest:
                pairs += [(known["outputs"], B[None])]
            elif layer.module.parts[part].index is None:
                size = known["outputs"].shape[1]
                assert size <= widest
                pairs += [(known["outputs"], np.stack([B[i : i + size, i : i + size] for i in range(0, len(B), size)]))]
            else:  # its rows are in another order than the model's
                assert known.keys() == {"guided"}
            for got, want in pairs:
                np.testing.assert_allclose(got, want, rtol=5e-2, atol=5e-3 * np.abs(want).max())
