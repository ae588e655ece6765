"""The command peers: a bundle beside peers that only pretend, made of the same weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pmpd.eval.cli import main
from pmpd.eval.measure.models import Forced, Scheduled
from pmpd.eval.speed import speed
from pmpd.eval.speed.contenders import Process, peers
from pmpd.eval.speed.contenders.peers import weights_name
from pmpd.runtime import PmpdError
from pmpd.runtime.console.command import Terminated

# Takes a fixed time, and finds all tokens equally likely; notes what it is asked.
FAKE = """
import json
from pathlib import Path

class Fake:
    def __init__(self, options):
        self.folder, self.variant = Path(options["folder"]), options["variant"]
        vocab = 1000 if self.variant == "Q2_K" else 4096
        self.facts = {"version": "fake 1.0", "model_bytes": 9_000_000, "step_bytes": 8_000_000, "cache_bytes": 1000,
                      "vocab_size": vocab}

    def run(self, *, prompt, tokens):
        self.note("run", prompt, tokens)
        return {"prefill_seconds": 0.5, "seconds": [0.25] * len(tokens)}

    def logits(self, *, prompt, answer):
        self.note("logits", prompt, answer)
        if self.variant == "Q8_0":
            raise ValueError("no logits")
        return [[7.0] * 4096 for _ in answer[1:]]

    def note(self, *what):
        with open(self.folder / "asked", "a") as file:
            file.write(json.dumps(what) + "\\n")

def make(options):
    (Path(options["folder"]) / "weights").write_text(options["weights"])

load = Fake
"""


@pytest.fixture(autouse=True)
def fake_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fake.py"
    file.write_text(FAKE, encoding="utf-8")
    monkeypatch.setitem(peers.PEERS, "llama.cpp", file)
    monkeypatch.setattr(speed, "_SETTLE_SECONDS", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "stories.txt"
    file.write_text("Once upon a time there was a girl with a red ball and a small dog. " * 40, encoding="utf-8")
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["peers", *map(str, arguments)])


@pytest.mark.full
def test_size_speed_and_perplexity_in_one_table(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    report, models = tmp_path / "c.json", tmp_path / "models"
    result = run(
        demo_bundle, "--data", data, "--limit", 1, "--prompt-tokens", 8, "--max-new-tokens", 4, "--repetitions", 2,
        "--schedule", "uniform:4", "--schedule", "uniform:2", "--threads", 1, "--json", report, "-q",
        "--peer", "llama.cpp:Q4_0", "--peer-models", models,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text(encoding="utf-8"))
    fp, four, two, peer = document["rows"]
    assert [row["name"] for row in document["rows"]] == ["fp", "uniform:4", "uniform:2", "llama.cpp Q4_0"]
    assert (fp["model_bytes"], fp["decode_tps"], fp["difference"]) == (None, None, None)
    assert peer["step_bytes"] == 8_000_000  # as the peer says, without the cache
    assert peer["decode_tps"]["value"] == pytest.approx(4)
    assert peer["perplexity"]["value"] == pytest.approx(4096)  # all tokens equally likely
    assert peer["difference"]["value"] == pytest.approx(4096 - fp["perplexity"]["value"])
    assert two["step_bytes"] < four["step_bytes"] < four["model_bytes"]
    assert two["perplexity"]["value"] > fp["perplexity"]["value"]
    pairs = {(pair["ours"], pair["peer"]): pair for pair in document["pairs"]}
    assert list(pairs) == [("uniform:4", "llama.cpp Q4_0"), ("uniform:2", "llama.cpp Q4_0")]
    pair = pairs["uniform:2", "llama.cpp Q4_0"]
    assert pair["bytes"] == pytest.approx(two["step_bytes"] / 8_000_000)
    assert pair["difference"]["value"] == pytest.approx(two["perplexity"]["value"] - 4096)
    rates = [4 / sum(timing["seconds"]) / 4 for timing in document["timings"]["uniform:2"]]
    assert pair["decode"]["value"] == pytest.approx(sum(rates) / 2)
    (folder,) = models.iterdir()
    weights = Path((folder / "weights").read_text())
    assert folder.name == weights_name(weights)
    assert (weights / "config.json").is_file()  # the checkpoint that the bundle was made from
    asked = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    # The text itself is the prompt, and then what is decoded; for perplexity the window is cut in two halves.
    (kind, context, answer), window = asked[-1], document["scores"]["fp"][0]
    assert (kind, len(answer) - 1) == ("logits", window["steps"])
    assert asked[0] == ["run", context[:8], context[8:12]]
    assert asked[1] == ["run", context[12:20], context[20:24]]
    assert "| llama.cpp Q4_0 | 4.00 | 9.0 | 8.0 | 4.0 | 16.0 |" in " ".join(result.stdout.split())
    assert "4096.00" in result.stdout


def measure_two(demo_bundle: Path, data: Path, folder: Path, variants: str) -> tuple[Result, dict[str, Any]]:
    """Compare two schedules and peers in two repetitions; return also the JSON, empty if none was written."""
    report = folder / "c.json"
    result = run(
        demo_bundle, "--data", data, "--limit", 1, "--prompt-tokens", 8, "--max-new-tokens", 4, "--repetitions", 2,
        "--schedule", "uniform:4", "--schedule", "uniform:2", "--threads", 1, "--json", report, "-q",
        "--peer", f"llama.cpp:{variants}", "--peer-models", folder / "models",
    )  # fmt: skip
    return result, json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}


def test_a_peer_that_fails_late_loses_only_its_own_figures(demo_bundle: Path, data: Path, tmp_path: Path) -> None:
    result, document = measure_two(demo_bundle, data, tmp_path, "Q4_0,Q8_0")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: llama.cpp Q8_0: ValueError: no logits; speed: 2 of 2 repetitions are finished, "
        "perplexity: 4 of 5 rows are finished; missing: perplexity of llama.cpp Q8_0\n"
    )
    assert document["unfinished"] == ["perplexity of llama.cpp Q8_0"]
    *others, failed = document["rows"]
    assert all(row["perplexity"] for row in others)
    assert (failed["name"], failed["perplexity"], failed["difference"]) == ("llama.cpp Q8_0", None, None)
    assert failed["decode_tps"]["value"] == pytest.approx(4)
    assert failed["step_bytes"] == 8_000_000
    pair = document["pairs"][-1]
    assert (pair["ours"], pair["peer"], pair["difference"]) == ("uniform:2", "llama.cpp Q8_0", None)
    assert pair["decode"]["value"] > 0
    assert "| llama.cpp Q8_0 | 8.00 | 9.0 | 8.0 | 4.0 | 16.0 |" in " ".join(result.stdout.split())


ROWS = ["fp", "uniform:4", "uniform:2", "llama.cpp Q4_0"]


@pytest.mark.parametrize(
    ("interrupt", "code", "turn", "missing"),
    [  # four turns to warm up, four a repetition: two schedules, the switching between them, the peer
        (KeyboardInterrupt(), 130, 6, None),
        (KeyboardInterrupt(), 130, 12, ["perplexity of llama.cpp Q4_0"]),
        (Terminated(15), 143, 10, ["repetition 2", *(f"perplexity of {name}" for name in ROWS)]),
    ],
)
def test_an_interrupt_keeps_what_is_finished(
    interrupt: KeyboardInterrupt,
    code: int,
    turn: int,
    missing: list[str] | None,
    demo_bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, run_turn = iter(range(100)), Process.run

    def interrupted(self: Process, **request: object) -> dict[str, Any]:
        if next(turns) == turn:
            raise interrupt
        return run_turn(self, **request)

    monkeypatch.setattr(Process, "run", interrupted)
    result, document = measure_two(demo_bundle, data, tmp_path, "Q4_0")
    assert result.exit_code == code
    if missing is None:
        assert (result.stdout, result.stderr, document) == ("", "error: interrupted: nothing was written\n", {})
        return
    assert document["unfinished"] == missing
    assert result.stderr.startswith("error: interrupted: speed: ")
    assert result.stderr.endswith(f"missing: {', '.join(missing)}\n")
    assert [row["name"] for row in document["rows"]] == ROWS
    assert [bool(row["perplexity"]) for row in document["rows"]] == [
        f"perplexity of {row['name']}" not in missing for row in document["rows"]
    ]
    assert {len(timings) for timings in document["timings"].values()} == {1 if "repetition 2" in missing else 2}
    assert "| llama.cpp Q4_0 |" in result.stdout


def test_a_schedule_that_fails_keeps_the_speed(
    demo_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force = Scheduled.force

    def failing(self: Scheduled, *arguments: Any, **options: Any) -> Iterator[Forced]:
        if self._schedule.precision(0) == 2:
            raise PmpdError("logits are not finite")
        return force(self, *arguments, **options)

    monkeypatch.setattr(Scheduled, "force", failing)
    result, document = measure_two(demo_bundle, data, tmp_path, "Q4_0")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: logits are not finite; speed: 2 of 2 repetitions are finished, "
        "perplexity: 0 of 4 rows are finished; missing: perplexity of fp, "
    )
    assert document["scores"] == {}
    assert all(row["decode_tps"] for row in document["rows"] if row["name"] != "fp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "llama.cpp:Q4_0"], "peers need --peer-models"),
        (
            ["--peer", "llama.cpp:Q2_K", "--peer-models", "{folder}/m"],
            "llama.cpp Q2_K has 1000 tokens, the bundle 4096",
        ),
        (["--prompt-tokens", "700"], "the data have 512 tokens in 1 window, "),
        (["--limit", "0"], "limit must be 1 or more, got 0"),
        (["--peer-weights", "{folder}"], "give a checkpoint folder with safetensors, or a .gguf file"),
    ],
)
def test_a_mistake_is_one_clear_line(
    demo_bundle: Path, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(folder=tmp_path) for argument in arguments]
    result = run(demo_bundle, "--data", data, "--limit", 1, *filled)  # the last of an option given twice counts
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert (result.exit_code, result.stdout) == (1, "")


def test_models_are_made_again_when_the_weights_change(tmp_path: Path) -> None:
    file = tmp_path / "model-1.5b.gguf"
    file.write_bytes(b"one")
    before = weights_name(file)
    assert before.startswith("model-1.5b-")
    assert weights_name(file) == before
    file.write_bytes(b"another")
    assert weights_name(file) != before
    with pytest.raises(PmpdError, match=r"peers' weights .*missing\.gguf: give a checkpoint folder"):
        weights_name(tmp_path / "missing.gguf")


def test_likelihoods_of_a_contender() -> None:
    from pmpd.eval.speed.contenders.serve import score

    class Certain:
        def logits(self, *, prompt: list[int], answer: list[int]) -> list[list[float]]:
            return [[0.0, 0.0, math.log(2.0)], [1000.0, 0.0, 0.0]]

    assert score(Certain(), prompt=[0], answer=[1, 2, 0])["nll"] == pytest.approx([math.log(2), 0.0])
