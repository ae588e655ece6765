"""The measurement of starts: cold and warm processes, their memory, and what it says of one that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pmpd.eval.speed.start import Start, drop_from_cache, measure_start, table
from pmpd.runtime.errors import PmpdError

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs Linux")


@pytest.mark.full
def test_a_bundle_starts_cold_and_warm(demo_bundle: Path) -> None:
    start = Start("demo", demo_bundle, "bundle")
    measure_start([start], repetitions=1, tokens=3, threads=1)
    assert [len(start.seconds[state]) for state in ("cold", "warm")] == [1, 1]
    assert all(0 < seconds < 120 for times in start.seconds.values() for seconds in times)
    assert start.memory.keys() == {"loaded", "first", "done"}
    weights = (demo_bundle / "weights.bin").stat().st_size
    assert start.memory["done"]["RssFile"] >= start.memory["loaded"]["RssFile"] > 0
    assert start.memory["done"]["RssAnon"] < 400e6 + weights
    text = table([start], tokens=3)
    assert text.startswith("| | first token, cold | warm | memory when loaded | after 3 tokens |\n")
    assert "| demo | " in text


def test_a_contender_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PmpdError, match=r"^nothing failed: .*has no bundle\.json") as failure:
        measure_start([Start("nothing", tmp_path, "bundle")], repetitions=1, tokens=1, threads=1)
    assert "\n" not in str(failure.value)
    with pytest.raises(PmpdError, match="cannot run"):
        measure_start([Start("x", tmp_path, "gguf", str(tmp_path / "python"))], repetitions=1, tokens=1, threads=1)


def test_dropping_keeps_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * 10_000)
    drop_from_cache([file])
    assert file.read_bytes() == b"x" * 10_000
