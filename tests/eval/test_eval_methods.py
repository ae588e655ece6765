"""Quantization methods compared on a checkpoint, without bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import TINY_MODELS

from pmpd.eval.methods.compare import Choice, MethodScores, compare_methods, main, table
from pmpd.eval.methods.dense_sparse import dense_and_sparse, quantized
from pmpd.exporter import Export, ExportConfig
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.format.bitplanes import row_stride


@pytest.mark.full
def test_fewer_bits_are_further_from_the_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a girl with a red ball and a small dog named Max. " * 80)
    file = tmp_path / "scores.json"
    methods = ["--method", "anyprecision", "--method", "anyprecision:seed=4"]
    result = CliRunner().invoke(
        main, ["demo", "--data", str(text), "--limit", "2", "--precisions", "8,3", *methods, "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    fp, *rows = [MethodScores(**row) for row in json.loads(file.read_text())]
    assert [(row.method, row.precision) for row in rows] == [
        ("anyprecision", 8), ("anyprecision", 3), ("anyprecision:seed=4", 8), ("anyprecision:seed=4", 3)
    ]  # fmt: skip
    assert fp.method == "fp"
    assert max(map(abs, fp.kl)) < 1e-4
    assert min(fp.top1) > 0.99
    eight, three, _, other_seed = rows
    assert all(a < 0.01 < b for a, b in zip(eight.kl, three.kl, strict=True))
    assert three.kl != other_seed.kl  # the option counts
    lines = table([fp, *rows]).splitlines()
    assert len(lines) == 9
    assert lines[3].startswith("| anyprecision | 8 |")


def test_a_ratio_has_the_interval_of_paired_differences() -> None:
    fp = MethodScores("fp", 0, 0.0, [0.0, 0.0], [2.0, 3.0], [1.0, 1.0], 0.0)
    one = MethodScores("one", 4, 4.5, [0.1, 0.3], [2.1, 3.1], [0.9, 0.9], 1.0)
    other = MethodScores("other", 4, 4.25, [0.05, 0.27], [2.1, 3.1], [0.9, 0.9], 1.0)
    assert "| other | 4 | 4.25 | 0.1600 ± 1.3981 | 0.800 ± 0.636 |" in table([fp, one, other])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("squash", "unknown method 'squash'"),
        ("guided:damping", "damping must be a number, got '': write guided:damping=1"),
        ("guided:damping=a b", "damping must be a number, got 'a b'"),
        ("guided:damping='a'", "damping must be a number"),
        ("guided:damp=1", "unknown option of method guided 'damp'"),
        ("dns:outliers=2", "outliers must be a share from 0 to 1"),
        ("guided:parent=8", "unknown option of method guided 'parent'"),
    ],
)
def test_choices_that_are_none(text: str, message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        Choice.parse(text)


def test_a_choice_reads_as_it_is_written() -> None:
    choice = Choice.parse("guided:damping=0.3;rounds=1")
    assert choice.options == {"damping": 0.3, "rounds": 1}
    assert str(choice) == "guided:damping=0.3;rounds=1"


def test_precisions_that_are_none(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c")
    result = CliRunner().invoke(main, ["demo", "--data", str(text), "--precisions", "4,x"])
    assert result.exit_code == 1
    assert "'4,x' is not a list of bits like 4,3,2" in result.output


def test_a_mix_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b c")
    result = CliRunner().invoke(main, ["demo", "--data", str(tmp_path / "text.txt"), "--precisions", "4,3.5"])
    assert result.exit_code == 1
    assert "precisions 4,3.5: a mix belongs to a bundle: give whole precisions" in result.output


@pytest.fixture(scope="module")
def export() -> Export:
    return Export.prepare(
        ExportConfig(model="demo", output=Path("unused"), precisions=(4, 2), calibration="none", targets=())
    )


def test_outliers_are_the_weights_that_cost_most_and_stay_floats(export: Export) -> None:
    layer = export.plan.linears[0]
    weight = np.concatenate(
        [layer.part_weight(i, export.checkpoint.tensor(name)) for i, name in enumerate(layer.weight_names)]
    )
    plain = quantized(export, layer, None)
    sparse = dense_and_sparse(export, layer, None, outliers=0.01)
    count = round(0.01 * weight.size)
    assert len(sparse.outliers) == count
    least = np.sort(np.square(weight - plain.weight(2)).ravel())[-count]
    assert (np.square(weight - plain.weight(2)).ravel()[sparse.outliers] >= least).all()
    for bits in (4, 2):
        assert np.array_equal(sparse.weight(bits).ravel()[sparse.outliers], sparse.values.astype(np.float32))
        assert np.square(weight - sparse.weight(bits)).mean() < np.square(weight - plain.weight(bits)).mean()
        assert sparse.nbytes(bits) == plain.nbytes(bits) + (32 * count + 32 * len(weight)) // 8
    rows, columns = weight.shape
    assert plain.nbytes(2) == rows * (2 * row_stride(columns) + 2 * 4)


def test_no_outliers_are_the_method_itself(export: Export) -> None:
    layer = export.plan.linears[0]
    plain, sparse = quantized(export, layer, None), dense_and_sparse(export, layer, None, outliers=0.0)
    assert np.array_equal(sparse.weight(2), plain.weight(2))
    assert sparse.nbytes(2) == plain.nbytes(2)


@pytest.mark.full
def test_a_bundle_scores_as_the_method_that_it_was_made_by(tmp_path: Path, demo_bundle: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a girl with a red ball and a small dog named Max. " * 80)
    arguments = ["demo", "--data", str(text), "--limit", "2", "--calibration", "none", "--method", "anyprecision"]
    file = tmp_path / "scores.json"
    result = CliRunner().invoke(main, [*arguments, "--bundle", str(demo_bundle), "--json", str(file), "-q"])
    assert result.exit_code == 0, result.output
    _, *rows = [MethodScores(**row) for row in json.loads(file.read_text())]
    assert [row.method for row in rows] == ["anyprecision"] * 3 + ["demo-pmpd"] * 3
    for ours, theirs in zip(rows[:3], rows[3:], strict=True):
        assert (ours.precision, ours.bits, ours.kl, ours.loss) == (
            theirs.precision, theirs.bits, theirs.kl, theirs.loss
        )  # fmt: skip


def test_a_bundle_of_another_model(tmp_path: Path, demo_bundle: Path) -> None:
    model = TINY_MODELS["llama"].save(tmp_path / "llama")
    with pytest.raises(PmpdError, match="is not a bundle of"):
        list(compare_methods(str(model), [Choice.parse("rtn")], tmp_path / "x", bundles=[Bundle.open(demo_bundle)]))


@pytest.mark.full
def test_a_model_of_its_own_at_each_precision_is_nearer_than_a_nested_one(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a girl with a red ball and a small dog named Max. " * 80)
    choices = [Choice.parse(choice) for choice in ("hqq", "hqq:alone=1", "hqq:alone=1;groups=2")]
    options = {"calibration": None, "precisions": (3, 2), "parent": None}
    _, *rows = compare_methods("demo", choices, text, limit=2, **options)
    assert [(row.method, row.precision) for row in rows] == [
        (str(choice), bits) for choice in choices for bits in (3, 2)
    ]
    nested, _, alone, _, groups, _ = rows
    assert groups.bits > alone.bits
    assert alone.bits == pytest.approx(3 + 19 / 256, abs=0.06)  # rows of 256 weights and of more
    assert nested.bits > alone.bits  # a codebook is larger than a scale and a zero-point


@pytest.mark.full
def test_methods_with_and_without_statistics_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a girl with a red ball and a small dog named Max. " * 80)
    options = ["--limit", "2", "--precisions", "3", "--calibration", str(text), "--calibration-samples", "2"]
    methods = ["--method", "rtn", "--method", "anyprecision"]
    result = CliRunner().invoke(main, ["demo", "--data", str(text), *options, *methods])
    assert result.exit_code == 0, result.output
    assert "| rtn | 3 |" in result.output
    assert "| anyprecision | 3 |" in result.output
