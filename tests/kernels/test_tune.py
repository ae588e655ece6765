"""The search for kernels' best choices: what it finds, that it goes on where it stopped, and what reads its records."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pmpd.runtime.errors import PmpdError

pytest.importorskip("tvm")

from click.testing import CliRunner

from pmpd.tvm_kernels.bench import measure
from pmpd.tvm_kernels.bench.measure import machine_isas
from pmpd.tvm_kernels.bench.shapes import Shape, model_shapes, parse_shape
from pmpd.tvm_kernels.codegen.isa import ISAS, isa_named
from pmpd.tvm_kernels.models import shipped_config
from pmpd.tvm_kernels.ops.matmul import tuned
from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES, MatmulKernel
from pmpd.tvm_kernels.ops.matmul.tuned import RECORDS, default_tuning, key_of, load_records, tuned_kernels, tuning
from pmpd.tvm_kernels.ops.matmul.tuning import Tuning
from pmpd.tvm_kernels.targets import TARGETS, find_target, host_target
from pmpd.tvm_kernels.tuning import search
from pmpd.tvm_kernels.tuning.cli import main
from pmpd.tvm_kernels.tuning.search import GRIDS, Scores, candidates, halve
from pmpd.tvm_kernels.tuning.tuner import Tuner, TuneSettings

BEST = {"rows": 2, "batch": 4, "sums": 2, "prefetch": 2048, "chunk": 64, "tokens": 4, "depth": 2}


def kernel(isa: str = "avx2", **changes: Any) -> MatmulKernel:
    values = {"bits": 4, "accuracy": "int8", "phase": "gemv", "tuning": Tuning()} | changes
    return MatmulKernel(isa=isa_named(isa), **values)


class Judge:
    """In the place of the machine: likes `BEST`, the less the further away; counts the samples it takes."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.samples: list[tuple[int, int]] = []
        self.tuned = 0
        self.stop_after = stop_after

    def enter(self, entrants: Sequence[MatmulKernel]) -> Scores:
        names = [name for name in BEST if len({getattr(each.tuning, name) for each in entrants}) > 1]

        def scores(kernels: Sequence[MatmulKernel], rounds: int) -> list[float]:
            assert set(kernels) <= set(entrants)
            self.samples.append((len(kernels), rounds))
            return [-sum(abs(getattr(each.tuning, name) - BEST[name]) for name in names) for each in kernels]

        return scores

    def figures(self, best: MatmulKernel) -> dict[str, float]:
        if self.tuned == self.stop_after:
            raise KeyboardInterrupt
        self.tuned += 1
        return {"of_read": 0.5}


@pytest.mark.parametrize("phase", ["gemv", "gemm"])
def test_search_finds_the_best_choices(phase: Any) -> None:
    found = search.search(kernel("avx512", phase=phase), Judge().enter)
    searched = {name for grid in GRIDS[phase] for name in grid}
    assert {name: getattr(found.tuning, name) for name in searched} == {name: BEST[name] for name in searched}


def test_samples_are_spent_on_the_better_half() -> None:
    judge = Judge()
    entrants = candidates(kernel(), {"chunk": (16, 32, 64, 128, 256)})
    assert halve(entrants, judge.enter(entrants)).tuning.chunk == 64
    assert judge.samples == [(5, 4), (3, 8), (2, 16)]


def test_search_of_one_candidate_samples_nothing() -> None:
    judge = Judge()
    assert halve([kernel()], judge.enter([kernel()])) == kernel()
    assert judge.samples == []


@pytest.mark.parametrize("isa", [isa.name for isa in ISAS])
def test_every_grid_has_choices_that_fit_the_registers(isa: str) -> None:
    grid = GRIDS["gemm"][0]
    tried = candidates(kernel(isa, phase="gemm"), grid)
    assert len(tried) > 2
    for each in tried:
        assert each.tuning.rows * (each.tuning.tokens + 1) < each.isa.registers


def settings(output: Path, **changes: Any) -> TuneSettings:
    values = {
        "isas": ("avx2", "neon"),
        "phases": ("gemv", "gemm"),
        "accuracies": ("int8",),
        "precisions": (2, 4),
        "shapes": (Shape(64, 512),),
        "threads": 2,
        "output": output,
    }
    return TuneSettings(**values | changes)


def test_tuning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stopped = Tuner(settings(tmp_path), Judge(stop_after=3))
    with pytest.raises(KeyboardInterrupt):
        list(stopped.run())
    assert [key_of(each) for each in stopped.todo[:3]] == ["gemv-int8-2", "gemv-int8-4", "gemv-int8-2"]
    assert set(load_records("avx2", tmp_path)["kernels"]) == {"gemv-int8-2", "gemv-int8-4"}
    assert set(load_records("neon", tmp_path)["kernels"]) == {"gemv-int8-2"}

    resumed = Tuner(settings(tmp_path), Judge())
    assert resumed.todo == stopped.todo[3:]
    list(resumed.run())
    assert len(load_records("avx2", tmp_path)["kernels"]) == len(load_records("neon", tmp_path)["kernels"]) == 4
    assert Tuner(settings(tmp_path), Judge()).todo == []
    assert len(Tuner(settings(tmp_path, precisions=(2, 3, 4)), Judge()).todo) == 4
    assert len(Tuner(settings(tmp_path, overwrite=True), Judge()).todo) == 8
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changes", [{"threads": 3}, {"shapes": (Shape(64, 1024),)}])
def test_records_of_other_conditions_are_not_mixed(tmp_path: Path, changes: dict[str, Any]) -> None:
    list(Tuner(settings(tmp_path, precisions=(2,)), Judge()).run())
    with pytest.raises(PmpdError, match=rf"avx2\.json has {next(iter(changes))} .*--overwrite"):
        Tuner(settings(tmp_path, **changes), Judge())


def write_records(folder: Path, isa: str, rows: int) -> None:
    choices = {"tuning": {"rows": rows, "prefetch": 7, "chunk": 9}}
    (folder / f"{isa}.json").write_text(json.dumps({"isa": isa, "kernels": {"gemv-int8-4": choices}}))


def test_records_of_a_user_come_first_then_ours_then_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, own = tmp_path / "ours", tmp_path / "own"
    ours.mkdir()
    own.mkdir()
    monkeypatch.setattr(tuned, "RECORDS", ours)
    asked = isa_named("avxvnni"), 4, "int8", "gemv"
    assert tuning(*asked, folder=own) == (default_tuning(*asked), "defaults")
    write_records(own, "avx2", 8)
    assert tuning(*asked, folder=own) == (Tuning(rows=8, prefetch=7, chunk=9), "avx2")
    write_records(ours, "avxvnni", 4)
    assert tuning(*asked, folder=own)[0].rows == tuning(*asked)[0].rows == 4
    write_records(own, "avxvnni", 2)
    assert tuning(*asked, folder=own) == (Tuning(rows=2, prefetch=7, chunk=9), "avxvnni")
    assert tuning(isa_named("avx512"), 4, "int8", "gemv", folder=own)[1] == "defaults"


def test_kernels_without_records_are_one_line_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuned, "RECORDS", tmp_path)
    write_records(tmp_path, "avx2", 1)
    caplog.set_level(logging.DEBUG, "pmpd")
    made = tuned_kernels(find_target("x86-64-v3"), find_target("x86-64-v3").isa, precisions=[4])
    assert [(each.isa.name, each.tuning.rows) for each in made if key_of(each) == "gemv-int8-4"] == [
        ("avxvnni", 1),
        ("avx2", 1),
    ]
    *details, line = caplog.records
    assert [record.levelno for record in details] == [logging.DEBUG] * 7
    assert (line.levelno, line.getMessage()) == (
        logging.INFO,
        "x86-64-v3: 7 of 8 kernels have no tuning record and use another's (1 avxvnni from avx2, "
        "3 avxvnni from defaults, 3 avx2 from defaults): run `pmpd-tune` on such a machine",
    )
    for isa in ("avxvnni", "avx2"):
        records = {"isa": isa, "kernels": {key_of(each): {"tuning": {}} for each in made}}
        (tmp_path / f"{isa}.json").write_text(json.dumps(records))
    caplog.clear()
    tuned_kernels(find_target("x86-64-v3"), find_target("x86-64-v3").isa, precisions=[4])
    assert caplog.messages == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": {"gemv-int8-4": {"tuning": {"row": 1}}}}'])
def test_a_broken_file_of_records_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "avx2.json").write_text(text)
    with pytest.raises(PmpdError, match=r"avx2\.json is not a file of tuning records .*pmpd-tune"):
        tuning(isa_named("avx2"), 4, "int8", "gemv", folder=tmp_path)


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_our_records_are_of_kernels_and_from_the_grids(path: Path) -> None:
    records = load_records(path.stem)
    assert records["isa"] == path.stem
    assert {f"gemv-int8-{bits}" for bits in (2, 3, 4, 6)} <= set(records["kernels"])
    for key, found in records["kernels"].items():
        phase, accuracy, bits = key.split("-")
        assert accuracy in ACCURACIES
        assert int(bits) in range(1, 9)
        choices = {name: {value for grid in GRIDS[phase] for value in grid.get(name, ())} for name in found["tuning"]}  # type: ignore[index]
        assert all(found["tuning"][name] in values for name, values in choices.items()), key


def test_shapes_of_models() -> None:
    assert model_shapes("phi-1.5") == (Shape(6144, 2048), Shape(2048, 2048), Shape(8192, 2048), Shape(2048, 8192))
    assert model_shapes("llama3-8b")[0] == Shape(6144, 4096)  # 8 key/value heads of 128
    assert model_shapes("vicuna-7b")[2] == Shape(22016, 4096)  # gate and up in one


def test_shapes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shipped_config("phi-1.5")))
    assert model_shapes(str(tmp_path)) == model_shapes("phi-1.5")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PmpdError, match="lacks 'hidden_size'"):
        model_shapes(str(tmp_path))
    with pytest.raises(PmpdError, match=r"unknown model 'phi-15': choose one of phi-1\.5"):
        model_shapes("phi-15")


@pytest.mark.parametrize("text", ["8192", "8192,", "0,5", "a,b", "1,2,3"])
def test_a_shape_is_two_numbers(text: str) -> None:
    assert parse_shape("8192,2048") == parse_shape("8192x2048") == Shape(8192, 2048)
    with pytest.raises(PmpdError, match="is not N,K"):
        parse_shape(text)


@pytest.mark.full
def test_the_command_tunes_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isas = machine_isas(find_target(host_target() or "x86-64-v3"))
    if not isas:
        pytest.skip("no kernels are made for this machine")
    monkeypatch.setattr(measure, "WORKING_SET", 1 << 16)
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 16)
    monkeypatch.setitem(GRIDS, "gemv", ({"rows": (1, 2)}, {"chunk": (16, 64)}))  # type: ignore[arg-type]
    wanted = ["--shape", "50,512", "--isa", isas[0], "--bits", "2", "--phase", "gemv", "--accuracy", "int8"]
    result = CliRunner().invoke(main, [*wanted, "--threads", "2", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path)
    assert f"{isas[0]} gemv int8 2 bits 1/1, " in result.stderr
    records = load_records(isas[0], tmp_path)
    assert (records["threads"], records["shapes"]) == (2, ["50x512"])
    (found,) = records["kernels"].values()
    assert found["tuning"]["rows"] in (1, 2)
    assert found["tuning"]["chunk"] in (16, 64)
    assert found["gbs"] > 0
    assert found["of_read"] > 0
    again = CliRunner().invoke(main, [*wanted, "--threads", "2", "--output", str(tmp_path)])
    assert again.stdout.splitlines() == [str(tmp_path)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "unknown precision '9'"),
        (["--isa", "sse2"], "unknown instruction set of this machine 'sse2'"),
        (["--phase", "gem"], "unknown phase 'gem': choose one of gem"),
        (["--shape", "8"], "shape '8' is not N,K"),
        (["--model", "gpt"], "unknown model 'gpt'"),
    ],
)
def test_the_command_names_wrong_options(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert "Traceback" not in result.output


def test_targets_have_known_instruction_sets() -> None:
    assert {name for target in TARGETS.values() for name in target.isa} == {isa.name for isa in ISAS}
