"""The table of schedules, on the demo model with a network that chooses by nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pmpd.eval.recipes.schedules import main
from pmpd.eval.solve.network import Network, to_onnx
from pmpd.eval.solve.publish import publish
from pmpd.runtime import Bundle
from pmpd.runtime.schedule.learned import SchedulerCard, weights_digest

STORIES = [
    "Once upon a time there was",
    "Tom had a red ball and",
    "A small bird sat on a big",
    "Sara and Ben went to the",
]


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    opened = Bundle.open(copy)
    cache = opened.manifest.kv_cache
    card = SchedulerCard(
        choices=("2@0", "4@0"), length=8, layer=0, prefill=4, confidence=0.5, weights=weights_digest(opened.manifest)
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = to_onnx(Network(cache.head_dim, 2, 4), card, heads=cache.heads, dtype=cache.dtype)
    publish(opened, "mine", network, json.dumps({"label_shares": [0.25, 0.75]}), default=False)
    return copy


def test_rows_of_the_table(bundle: Path, tmp_path: Path) -> None:
    data, report = tmp_path / "stories.jsonl", tmp_path / "r.json"
    data.write_text("".join(json.dumps({"start": story}) + "\n" for story in STORIES), encoding="utf-8")
    words = ["--task", "jsonl", "--data", data, "--prompt-template", "{start}", "--max-new-tokens", 9, "--threads", 1]
    words += ["--schedule", "mine", "--schedule", "static:4@0,2@4", "--json", report, "-q"]
    result = CliRunner().invoke(main, [str(bundle), *map(str, words)])
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["high"] == "uniform:4"
    rows = document["rows"]
    (learned,) = (name for name in rows if name.startswith("learned:"))
    assert list(rows) == [
        *("prefill:2,uniform:2", "uniform:2", "uniform:3", "uniform:4", "static:4@0,2@4"),
        *(learned, "random, uniform", "random, prior", "random, shuffled"),
    ]
    assert rows["uniform:4"]["scores"] == [100] * 4  # without references, its answers are the reference
    assert rows["random, shuffled"]["average_bits"] == pytest.approx(rows[learned]["average_bits"])
    low, high = rows["uniform:2"]["scores"], rows["uniform:4"]["scores"]
    prior = [0.25 * a + 0.75 * b for a, b in zip(low, high, strict=True)]
    assert rows["random, prior"]["scores"] == pytest.approx(prior)
    assert all(score in (a, b) for score, a, b in zip(rows[learned]["scores"], low, high, strict=True))
    assert 2 < rows["static:4@0,2@4"]["average_bits"] < 4
    assert f"| {learned} " in result.stdout
