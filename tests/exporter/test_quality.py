"""What quantization costs, as an export measures it: by definition, and on text that nothing was fitted to."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from tiny_models import TINY_MODELS, plain_model, save_with_tokenizer

from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.cli import main
from pmpd.exporter.config import ExportConfig, ResolvedConfig
from pmpd.exporter.demo import demo_model_path
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.verify.probe import ExposedGraph
from pmpd.exporter.verify.quality import BLOCKS, LENGTH, T95, TOKENS, QualityMeter, Sample
from pmpd.runtime import Bundle, Tokenizer
from pmpd.runtime.console.output import markdown_table

WINDOWS, PREDICTED, VOCABULARY = 4, 24, 50


def some_logits(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(WINDOWS, PREDICTED, VOCABULARY)).astype(np.float32) * 3


def some_sample() -> Sample:
    return Sample("x", np.random.default_rng(3).integers(0, VOCABULARY, (WINDOWS, PREDICTED + 1)))


def config_of(**options: Any) -> ResolvedConfig:
    options = {"calibration": "none"} | options
    return ExportConfig(model="demo", output=Path("out"), targets=(), **options).resolve()


def test_the_figures_are_those_of_the_definitions() -> None:
    sample, reference, logits = some_sample(), some_logits(1), some_logits(1) + some_logits(2) / 4
    meter = QualityMeter(sample, reference)
    row = meter.measure(3, logits)
    p, q = (x.reshape(-1, VOCABULARY).astype(np.float64) for x in (reference, logits))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (p, q))
    kl = (p * np.log(p / q)).sum(axis=1)
    targets = sample.windows[:, 1:].ravel()
    assert row.kl == pytest.approx(kl.mean(), rel=1e-4)
    means = kl.reshape(BLOCKS, -1).mean(axis=1)
    assert row.kl_ci95 == pytest.approx(T95 * means.std(ddof=1) / 4, rel=1e-3)
    assert row.top1 == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert 0 < row.top1 < 1
    position = np.arange(len(targets))
    assert row.perplexity == pytest.approx(math.exp(-np.log(q[position, targets]).mean()), rel=1e-5)
    quality = meter.quality
    assert quality.perplexity == pytest.approx(math.exp(-np.log(p[position, targets]).mean()), rel=1e-5)
    assert (quality.tokens, quality.precisions) == (WINDOWS * PREDICTED, (row,))


def test_a_model_is_at_no_distance_from_itself_and_hopeless_logits_have_a_finite_perplexity() -> None:
    meter = QualityMeter(some_sample(), some_logits(1))
    same = meter.measure(8, some_logits(1))
    assert (same.kl, same.kl_ci95, same.top1, same.perplexity) == (0, 0, 1, meter.quality.perplexity)
    assert math.isfinite(meter.measure(1, some_logits(2) * 1000).perplexity)


def test_calibration_text_is_measured_where_the_statistics_did_not_read(demo_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"On day {i} she counted {i * 7919} birds." for i in range(400)))
    config = config_of(calibration=text, calibration_samples=5, calibration_length=64)
    bundle, checkpoint = Bundle.open(demo_bundle), open_checkpoint("demo")
    sample = Sample.of(bundle, checkpoint, config)
    assert sample.text == "held-out calibration text"
    ids = Tokenizer.from_bundle(bundle).encode(text.read_text())
    used = set(torch.cat(calibration_batches(range(len(ids)), 5, 64), 1)[0].tolist())
    front = len(Tokenizer.from_bundle(bundle).encode(""))
    starts = set()
    for window in sample.windows[:, front:].tolist():
        (start,) = (i for i in range(len(ids)) if ids[i : i + len(window)] == window)
        assert not used & set(range(start, start + len(window)))
        starts.add(start)
    assert len(starts) == TOKENS // LENGTH
    # A text that the statistics read almost whole leaves nothing to measure on.
    whole = dataclasses.replace(config, calibration_samples=len(ids) // 64)
    assert Sample.of(bundle, checkpoint, whole).text == "a text that comes with pmpd"


@pytest.mark.parametrize("context", [16, 64, 4096])
def test_windows_fit_the_context_and_begin_with_the_start_token(context: int, demo_bundle: Path) -> None:
    bundle, checkpoint = Bundle.open(demo_bundle), open_checkpoint("demo")
    start = Tokenizer.from_bundle(bundle).encode("")
    object.__setattr__(bundle, "manifest", dataclasses.replace(bundle.manifest, context_length=context))
    sample = Sample.of(bundle, checkpoint, config_of())
    length = min(context, LENGTH)
    assert sample.text == "a text that comes with pmpd"
    assert sample.inputs.shape == (TOKENS // length, length)
    assert (sample.windows[:, : len(start)] == start).all()
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "tokenizer.json"}
    object.__setattr__(bundle, "manifest", dataclasses.replace(bundle.manifest, files=files))
    sample = Sample.of(bundle, checkpoint, config_of())
    assert (sample.text, sample.inputs.shape) == ("random text", (TOKENS // length, length))
    assert sample.windows.max() < bundle.manifest.architecture.vocab_size


def test_the_manifest_says_what_the_graphs_of_each_precision_do(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))  # a file is written beside the weights
    quality = bundle.manifest.quality
    assert quality is not None
    sample = Sample.of(bundle, open_checkpoint("demo"), config_of())
    windows = torch.from_numpy(sample.windows)
    with torch.inference_mode():
        output = plain_model(demo_model_path())(windows, labels=windows)
    assert quality.perplexity == pytest.approx(math.exp(output.loss), rel=1e-4)
    assert (quality.text, quality.tokens) == (sample.text, TOKENS)
    meter = QualityMeter(sample, output.logits[:, :-1].numpy())
    for row in quality.precisions:
        with ExposedGraph(bundle, bundle.manifest.graph("decode", row.precision)) as exposed:
            probe = exposed.open()
        own = meter.measure(row.precision, np.stack([probe.run([ids]).logits for ids in sample.inputs.tolist()]))
        assert row.kl == pytest.approx(own.kl, rel=1e-2)
        assert row.perplexity == pytest.approx(own.perplexity, rel=1e-2)
        assert row.top1 == pytest.approx(own.top1, abs=0.01)


def test_the_command_the_card_and_json_show_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, output = save_with_tokenizer(tmp_path / "model"), tmp_path / "out"
    command = ["-m", str(model), "-o", str(output), "--precisions", "4,2", "--target", "none", "--json", "-"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    quality = Bundle.open(output).manifest.quality
    assert quality is not None
    table = markdown_table(quality.rows())
    assert [line.split(" ")[1] for line in table.splitlines()[2:]] == ["unquantized", "4", "2"]
    assert f"quality   on 384 tokens of held-out calibration text; ± is half of a 95 % interval\n{table}" in (
        caplog.messages
    )
    assert table in (output / "README.md").read_text()
    assert json.loads(result.stdout)["quality"] == json.loads((output / "bundle.json").read_text())["quality"]


def test_what_was_not_verified_was_not_measured_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, output = TINY_MODELS["llama"].save(tmp_path / "model"), tmp_path / "out"
    command = ["-m", str(model), "-o", str(output), "--precisions", "2", "--target", "none", "--no-verify"]
    result = CliRunner().invoke(main, [*command, "--json", "-"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["quality"] is None
    assert "quality   not measured (--no-verify)" in caplog.messages
    assert "Not measured: it was exported with `--no-verify`" in (output / "README.md").read_text()
    assert "quality" not in json.loads((output / "bundle.json").read_text())  # so readers that do not know it open it
