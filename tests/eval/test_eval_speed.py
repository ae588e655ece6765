"""The task speed: what is computed from times, and the whole run, with peers that only pretend."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pmpd.eval.cli import main
from pmpd.eval.speed import speed
from pmpd.eval.speed.contenders import peers, process
from pmpd.eval.speed.contenders.bundle import BundleContender
from pmpd.eval.speed.contenders.peers import ModelShape, Peer, parse_peers
from pmpd.eval.speed.contenders.process import Process
from pmpd.eval.speed.speed import SpeedSettings, prepare_speed, switch_cost
from pmpd.eval.speed.traffic import step_bytes
from pmpd.runtime import Bundle, Generator, Manifest, NodeKernel, PmpdError
from pmpd.runtime.console.command import Terminated
from pmpd.runtime.engine.kernels import MATMUL

# Notes its turns in a file, chats on stdout, and takes a fixed time to the penny.
FAKE = """
from pathlib import Path

class Fake:
    facts = {"version": "fake 1.0", "model_bytes": 5_000_000}

    def __init__(self, options):
        self.options = options

    def run(self, *, prompt, tokens):
        print("chatter")
        with open(Path(self.options["folder"]) / "turns", "a") as file:
            file.write(f"{self.options['variant']} {len(prompt)} {len(tokens)}\\n")
        return {"prefill_seconds": 0.5, "seconds": [0.25] * len(tokens)}

def make(options):
    (Path(options["folder"]) / "made").write_text(" ".join(options["variants"]))
    assert options["shape"]["intermediate_size"] == 768

load = Fake
"""


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SETTLE_SECONDS", 0)


@pytest.fixture
def fake_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "fake.py"
    file.write_text(FAKE, encoding="utf-8")
    monkeypatch.setitem(peers.PEERS, "llama.cpp", file)
    return file


@pytest.fixture(scope="module")
def manifest(demo_bundle: Path) -> Manifest:
    return Bundle.open(demo_bundle).manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def table(result: Result) -> dict[str, list[str]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line for line in cells}


def test_a_row_per_precision_and_schedule(demo_bundle: Path, tmp_path: Path) -> None:
    json_file, csv_file = tmp_path / "s.json", tmp_path / "s.csv"
    result = run(
        demo_bundle, "--task", "speed", "--prompt-tokens", 8, "--max-new-tokens", 6, "--repetitions", 2, "-q",
        "--schedule", "static:2@3", "--json", json_file, "--csv", csv_file, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    document = json.loads(json_file.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["uniform:4", "uniform:2", "static:4@0,2@3", "switching"]  # what the schedule is compared with
    mixed = rows["static:4@0,2@3"]
    assert (mixed["precisions"], mixed["bits"]) == ([4, 4, 4, 2, 2, 2], 3)
    assert rows["switching"]["precisions"] == [4, 4, 2, 2, 4, 4]
    for row in rows.values():
        assert [len(timing["seconds"]) for timing in row["timings"]] == [6, 6]
        assert row["peak_bytes"] > row["model_bytes"] > row["step_bytes"]
        assert row["kernels"].keys() == {"prefill", "decode"}
        rates = [6 / sum(timing["seconds"]) for timing in row["timings"]]
        assert row["decode_tps"]["value"] == pytest.approx(sum(rates) / 2)
        assert row["gb_per_second"]["value"] == pytest.approx(sum(rates) / 2 * row["step_bytes"] / 1e9)
    times = [[timing["seconds"] for timing in rows[name]["timings"]] for name in rows]
    expected = [sum(four[:3] + two[3:]) / sum(ours) for four, two, ours, _ in zip(*times, strict=True)]
    assert mixed["expected_share"]["value"] == pytest.approx(sum(expected) / 2)
    assert rows["uniform:4"]["expected_share"] is None
    # All rows run the same graph for the prompt: one figure, of the repetitions of all of them.
    prefills = [8 / timing["prefill_seconds"] for row in rows.values() for timing in row["timings"]]
    assert all(row["prefill_tps"] == rows["uniform:4"]["prefill_tps"] for row in rows.values())
    assert mixed["prefill_tps"]["value"] == pytest.approx(sum(prefills) / 8)
    assert document["switch_cost"].keys() == {"switching"}
    assert document["environment"]["threads"] == 1
    written = list(csv.DictReader(io.StringIO(csv_file.read_text(encoding="utf-8"))))
    assert [row["name"] for row in written] == list(rows)
    assert float(written[0]["decode_tps"]) == pytest.approx(rows["uniform:4"]["decode_tps"]["value"])
    assert written[0]["expected_share"] == ""
    assert "A switch of precision costs" in result.stdout
    assert table(result)["uniform:2"][1] == "2.00"


def test_accuracies_and_peers_take_turns(demo_bundle: Path, fake_peer: Path, tmp_path: Path) -> None:
    report, models = tmp_path / "s.json", tmp_path / "models"
    result = run(
        demo_bundle, "--task", "speed", "--prompt-tokens", 8, "--max-new-tokens", 5, "--repetitions", 2,
        "--schedule", "uniform:3", "--accuracy", "exact", "--accuracy", "int8",
        "--peer", "llama.cpp:Q3_K_M,Q8_0", "--peer-models", models, "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (folder,) = models.iterdir()
    assert (folder / "made").read_text() == "Q3_K_M Q8_0"
    # A warm-up, then each repetition starts with the next in line: ours, ours, Q3, Q8 and round again.
    assert (folder / "turns").read_text().splitlines() == ["Q3_K_M 8 4", "Q8_0 8 4"] + 2 * ["Q3_K_M 8 5", "Q8_0 8 5"]
    document = json.loads(report.read_text(encoding="utf-8"))
    *ours, three, eight = document["rows"]
    assert [row["name"] for row in ours] == ["uniform:3 exact", "uniform:3 int8"]
    assert (three["name"], three["bits"], three["model_bytes"]) == ("llama.cpp Q3_K_M", 3, 5_000_000)
    assert three["decode_tps"] == {"value": pytest.approx(4), "ci95": 0, "count": 2}
    assert three["prefill_tps"] == {"value": pytest.approx(16), "ci95": 0, "count": 2}
    assert eight["peak_bytes"] > 1_000_000
    # Only peers of the same nominal bits are compared.
    assert [(ratio["ours"], ratio["peer"]) for ratio in document["ratios"]] == [
        ("uniform:3 exact", "llama.cpp Q3_K_M"),
        ("uniform:3 int8", "llama.cpp Q3_K_M"),
    ]
    rates = [5 / sum(timing["seconds"]) / 4 for timing in ours[0]["timings"]]
    assert document["ratios"][0]["decode"]["value"] == pytest.approx(sum(rates) / 2)
    assert "llama.cpp Q3_K_M, llama.cpp Q8_0: fake 1.0" in result.stdout


def test_a_schedule_written_in_two_ways_is_one_row(demo_bundle: Path) -> None:
    schedules = ("4", "uniform:4", " uniform:4", "static:4@0", "static:2@3", "static:4@0,2@3")
    plan = prepare_speed(
        Bundle.open(demo_bundle), SpeedSettings(schedules=schedules, prompt_tokens=8, max_new_tokens=4)
    )
    assert list(plan) == ["uniform:4", "uniform:2", "static:4@0,2@3", "switching"]


@pytest.mark.parametrize(
    ("cause", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: "),
        (Terminated(15), 143, "interrupted: "),
        (PmpdError("a peer died"), 1, "a peer died; "),
    ],
)
def test_an_interrupt_or_a_failure_keeps_whole_repetitions(
    cause: BaseException,
    code: int,
    message: str,
    demo_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, turns = tmp_path / "s.json", iter(range(100))
    run_turn = Process.run

    def interrupted(self: Process, **request: object) -> dict[str, object]:
        if next(turns) == 7:  # in the second repetition: with "switching" three rows take turns, first to warm up
            raise cause
        return run_turn(self, **request)

    monkeypatch.setattr(Process, "run", interrupted)
    result = run(
        demo_bundle, "--task", "speed", "--prompt-tokens", 4, "--max-new-tokens", 2, "--repetitions", 3, "-q",
        "--schedule", "uniform:4", "--schedule", "uniform:2", "--json", report,
    )  # fmt: skip
    assert result.exit_code == code
    assert f"{message}1 of 3 repetitions are finished" in result.stderr
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["unfinished"] == ["repetition 2", "repetition 3"]
    assert [len(row["timings"]) for row in document["rows"]] == [1, 1, 1]


def test_a_disturbed_turn_is_repeated(
    demo_bundle: Path, fake_peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_busy_seconds", iter([n * 1e6 for n in range(1000)]).__next__)  # very busy
    result = run(
        demo_bundle, "--task", "speed", "--prompt-tokens", 4, "--max-new-tokens", 2, "--repetitions", 1, "-q",
        "--schedule", "uniform:2", "--max-others", 1.5,
        "--peer", "llama.cpp:Q2_K", "--peer-models", tmp_path / "models",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (folder,) = (tmp_path / "models").iterdir()
    assert (folder / "turns").read_text().splitlines() == 6 * ["Q2_K 4 2"]  # a warm-up and five attempts


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def load(options): raise ValueError('no such\\nmodel')", "fake: ValueError: no such"),
        ("def load(options): import os, signal; os.kill(os.getpid(), signal.SIGILL)", "without an answer: .*SIGILL"),
        ("import sys; print('last words', file=sys.stderr); sys.exit(3)", "without an answer: last words"),
        ("import nonsense", "fake: ModuleNotFoundError: No module named 'nonsense'"),
    ],
)
def test_a_contender_that_fails_says_why(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "fake.py"
    file.write_text(body, encoding="utf-8")
    with pytest.raises(PmpdError, match=message):
        Process("fake", python=sys.executable, contender=file, options={})


def test_a_contender_that_dies_in_its_turn(tmp_path: Path) -> None:
    file = tmp_path / "fake.py"
    file.write_text("class load:\n facts = {}\n def __init__(self, _): pass\n def run(self): exit(1)", encoding="utf-8")
    with (
        Process("fake", python=sys.executable, contender=file, options={}) as running,
        pytest.raises(PmpdError, match="fake ended without an answer: exit code 1"),
    ):
        running.run()


def test_python_that_does_not_exist(fake_peer: Path) -> None:
    with pytest.raises(PmpdError, match="llama: cannot run no/python"):
        Process("llama", python="no/python", contender=fake_peer, options={})


def test_time_inside_the_kernels_of_the_decode_steps(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def node(graph: str, kernel: str | None, seconds: float, op: str = MATMUL) -> NodeKernel:
        return NodeKernel(graph=graph, node="x", op=op, bits=4, n=8, k=8, kernel=kernel, calls=1, seconds=seconds)

    nodes = [
        node("prefill.onnx", "gemm", 8.0),
        node("decode-4.onnx", "gemv4", 1.0),
        node("decode-4.onnx", "gemv6", 0.5),
        node("decode-4.onnx", "attention", 2.0, op="GroupQueryAttention"),
        node("decode-3.onnx", "stale", 4.0),  # ran in an earlier turn
        node("decode-2.onnx", None, 0.0),
    ]
    monkeypatch.setattr(Generator, "kernels", lambda self, reset=False: nodes)
    answer = BundleContender(str(demo_bundle), positions=8, threads=1).run(prompt=[1, 2, 3], precisions=[4, 4])
    assert answer["matmul_seconds"] == 1.5
    assert answer["kernels"] == {"prefill": ["gemm"], "decode": ["attention", "gemv4", "gemv6"]}
    assert len(answer["seconds"]) == 2


def test_bytes_of_a_step(manifest: Manifest) -> None:
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    planes = [tensor.length for tensor in manifest.tensors if tensor.nested]
    codebooks = {p: sum(t.length for name, t in tensors.items() if name.endswith(f".codebook.{p}")) for p in (2, 3, 4)}

    def at(precision: int, positions: int = 0) -> float:
        return step_bytes(manifest, precision=precision, positions=positions)

    assert at(4) - at(3) == sum(planes) / 4 + codebooks[4] - codebooks[3]
    assert at(4) - at(2) == sum(planes) / 2 + codebooks[4] - codebooks[2]
    rows = [(tensors[name], tensors[name].shape[0]) for name in ("rotary.cos", "rotary.sin")]
    words = manifest.architecture.vocab_size
    rows += [(tensors[f"model.embed_tokens.{name}"], words) for name in ("planes", "codebook.6")]
    unread = sum(tensor.length * (1 - 1 / count) for tensor, count in rows) + codebooks[3] + codebooks[2]
    assert at(4) + unread == pytest.approx(sum(tensor.length for tensor in manifest.tensors))  # the head's too
    kv = manifest.kv_cache
    numbers = 2 * kv.layers * kv.heads * kv.head_dim
    assert at(3, 100) - at(3) == 100 * numbers * {"float16": 2, "float32": 4}[kv.dtype]


def test_the_cost_of_a_switch() -> None:
    #                     first    switch       switch       switch
    precisions, seconds = (4, 4, 2, 2, 4, 4, 2, 2), (9.0, 4.0, 2.2, 2.0, 4.8, 4.0, 2.2, 2.0)
    assert switch_cost(precisions, seconds) == pytest.approx((0.2 + 0.1) / 2)
    assert switch_cost((4, 2, 4), (1.0, 1.0, 1.0)) is None  # nothing to compare with
    assert switch_cost((4, 4, 4), (1.0, 1.0, 1.0)) is None  # no switch


def test_peers_as_users_write_them() -> None:
    found = parse_peers(("llama.cpp:Q4_0, Q2_K", "onnxruntime-genai:int2g128", "llama.cpp:Q4_0"))
    assert [(peer.label, peer.nominal_bits) for peer in found] == [
        ("llama.cpp Q4_0", 4),
        ("llama.cpp Q2_K", 2),
        ("onnxruntime-genai int2g128", 2),
    ]
    assert Peer("llama.cpp", "F16").nominal_bits == 16


def test_the_shape_of_peers_models(manifest: Manifest) -> None:
    shape = ModelShape.of(manifest)
    assert (shape.family, shape.hidden_size, shape.intermediate_size) == ("llama", 256, 768)
    assert (shape.rotary_dim, shape.vocab_size) == (64, 4096)
    assert shape.digest == ModelShape.of(manifest).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "0"], "prompt tokens must be 1 or more, got 0"),
        (["--repetitions", "0"], "repetitions must be 1 or more, got 0"),
        (["--max-new-tokens", "1000"], "128 prompt and 1000 new tokens do not fit the model's context of 1024"),
        (["--accuracy", "int9"], "unknown accuracy 'int9': choose one of int8"),
        (["--schedule", "uniform:5"], "unknown precision '5'"),
        (["--peer", "llama.cpp:Q4_0"], "peers need --peer-models"),
        (["--peer", "llama:Q4_0"], "unknown peer 'llama': choose one of llama.cpp"),
        (["--peer", "llama.cpp"], "'' is no variant: give llama.cpp:VARIANT"),
        (["--peer", "llama.cpp:../x"], "'../x' is no variant"),
        (
            ["--peer", "onnxruntime-genai:int4g32_imatrix"],
            "'int4g32_imatrix': only llama.cpp takes an importance matrix: leave _imatrix out",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(demo_bundle: Path, arguments: list[str], message: str) -> None:
    result = run(demo_bundle, "--task", "speed", *arguments)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert (result.exit_code, result.stdout) == (1, "")
