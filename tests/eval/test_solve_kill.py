"""`kill -9` at any moment of `pmpd-schedule`: the bundle stays whole, and nothing finished is computed again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pmpd.runtime import Bundle

STARTS = ["Once upon a time,", "Tom had a red ball.", "One day, a bird", "Sara and Ben went", "The dog saw", "Lily was"]
# Runs the command, and kills its process with SIGKILL at a moment: before, inside or after the nth call of a function.
KILLED = """
import os, signal, sys
from pathlib import Path
from pmpd.eval.measure import samples
from pmpd.eval.solve import publish
from pmpd.eval.solve.cli import main

moment, count = sys.argv.pop(1).split("@")
calls = 0


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def killing(function, when):
    def called(*arguments, **options):
        global calls
        calls += 1
        if calls == int(count) and when == "before":
            end()
        result = function(*arguments, **options)
        if calls == int(count) and when == "after":
            end()
        return result

    return called


def half_a_line(self, keys, measured):
    global calls
    calls += 1
    keep(self, keys, measured)
    if calls == int(count):
        os.truncate(self._path, self._path.stat().st_size - 100)
        end()


keep = samples.Samples._keep
what, _, when = moment.partition(":")
if what == "answer":
    samples.Samples._keep = half_a_line if when == "inside" else killing(keep, when)
elif what == "write":
    publish.write_atomically = killing(publish.write_atomically, when)
elif what == "replace":
    Path.replace = killing(Path.replace, when)
sys.argv[0] = "pmpd-schedule"
main()
"""
# In their order: six while answers come in, five while the schedule is written into the bundle: a report, then
# bundle.json, each as a draft that replaces the file.
MOMENTS = [
    "answer:before@1",
    "answer:after@1",
    "answer:inside@2",
    "answer:after@2",
    "answer:before@3",
    "answer:inside@1",
    "write:before@1",
    "replace:before@1",
    "write:after@1",
    "replace:before@2",
    "replace:after@2",
]


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    return copy


def schedule(bundle: Path, data: Path, cache: Path, moment: str = "never@0") -> subprocess.CompletedProcess[str]:
    options: list[object] = ["--task", "jsonl", "--data", data, "--prompt-template", "{prompt}", "--max-new-tokens", 9]
    words = [*options, "--threads", 1, "--tolerance", "5%", "--as", "stories", "-q"]
    return subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(bundle), *map(str, words)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def answered(cache: Path) -> list[tuple[str, str]]:
    """Return the item and the schedule of each answer that is on disk, from lines that are whole."""
    pairs = list[tuple[str, str]]()
    for file in (cache / "pmpd" / "samples").glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                document = json.loads(line)
            except ValueError:  # cut off
                continue
            pairs += [(document["item"], name) for name in document["samples"]]
    return pairs


def without_counts(report: str) -> dict[str, Any]:
    """Return a report without what differs: how many steps this run computed itself."""
    document: dict[str, Any] = json.loads(report)
    for phase in document["phases"]:
        del phase["decode_steps"]
    return document


def check_files(bundle: Path) -> str:
    """Check that a bundle has the files that it lists and no other; return its report."""
    manifest = Bundle.open(bundle, verify=True).manifest
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files - {"README.md"} == {*manifest.files, "bundle.json"} - {"README.md"}
    return (bundle / manifest.reports["stories"]).read_text(encoding="utf-8")


@pytest.mark.full
def test_killed_at_ten_moments(bundle: Path, demo_bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in STARTS), encoding="utf-8")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(demo_bundle, undisturbed, copy_function=os.link)
    process = schedule(undisturbed, data, tmp_path / "cache-undisturbed")
    assert process.returncode == 0, process.stderr
    expected = without_counts(check_files(undisturbed))
    assert [phase["name"] for phase in expected["phases"]] == ["allocate", "switch"]

    cache = tmp_path / "cache"
    kept = list[tuple[str, str]]()
    for moment in MOMENTS:  # each run goes on where the one before was killed
        process = schedule(bundle, data, cache, moment)
        assert process.returncode == -signal.SIGKILL, f"{moment}: {process.stderr}"
        before, kept = kept, answered(cache)
        assert kept[: len(before)] == before
        Bundle.open(bundle, verify=True)
    process = schedule(bundle, data, cache)
    assert process.returncode == 0, process.stderr
    assert "0 decode steps computed" in process.stdout
    assert without_counts(check_files(bundle)) == expected
    final = answered(cache)
    assert len(final) == len(set(final))
    assert sorted(final) == sorted(answered(tmp_path / "cache-undisturbed"))
