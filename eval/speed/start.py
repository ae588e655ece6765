"""How long a model takes from the start of a process to its first token, and the memory that it then has.

    python -m pmpd.eval.speed.start BUNDLE --gguf MODEL.gguf --peer-python PYTHON

Each repetition starts a new process, once with the model's files out of the file cache (cold) and once with them in it
(warm); a bundle and a GGUF file under llama.cpp take turns. Cold is about the model's files alone, not Python's, and
pages that another process has mapped stay in memory: nothing else may use the model meanwhile. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError, one_line

__all__ = ["Start", "drop_from_cache", "main", "measure_start", "table"]

_CONTENDER = Path(__file__).with_name("contenders") / "start.py"
_PROMPT = "Rivers shape the land they cross. Over thousands of years"
_POSITIONS = 4096  # room in the KV cache, for all alike
_MEMORY = ("RssAnon", "RssFile", "RssShmem")


@dataclass
class Start:
    """One contender: where its model is, and what its runs measured.

    Attributes:
        name: what the table calls it.
        path: the bundle's folder or the GGUF file.
        kind: ``bundle`` or ``gguf``.
        python: the Python that runs it.
        seconds: from the start of the process to the first token, ``cold`` and ``warm``.
        memory: resident bytes of the last run by event (``loaded``, ``first``, ``done``) and kind (``RssAnon``, …).
    """

    name: str
    path: Path
    kind: str
    python: str = sys.executable
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cold": [], "warm": []})
    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The model's files."""
        return [file for file in self.path.rglob("*") if file.is_file()] if self.path.is_dir() else [self.path]


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the system to forget what it has cached of files; it keeps what some process has mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on disk yet are kept
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure_start(starts: Sequence[Start], *, repetitions: int, tokens: int, threads: int) -> None:
    """Run every contender cold, then warm, once per repetition; results go into `starts`.

    Raises:
        PmpdError: a contender does not start, or fails.
    """
    for _ in range(repetitions):
        for start in starts:
            for state in ("cold", "warm"):
                if state == "cold":
                    drop_from_cache(start.files)
                _run(start, state, tokens=tokens, threads=threads)


def _run(start: Start, state: str, *, tokens: int, threads: int) -> None:
    options = {
        "kind": start.kind,
        "path": str(start.path),
        "prompt": _PROMPT,
        "tokens": tokens,
        "threads": threads,
        "positions": _POSITIONS,
    }
    begin = time.perf_counter()
    try:
        process = subprocess.Popen(
            [start.python, "-P", _CONTENDER, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise PmpdError(f"{start.name}: cannot run {start.python} ({error.strerror}): give another Python") from None
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == "first":
                start.seconds[state].append(time.perf_counter() - begin)
            start.memory[said["event"]] = {kind: said[kind] for kind in _MEMORY}
        complaint = process.stderr.read()
    if process.returncode:
        raise PmpdError(f"{start.name} failed: {one_line(complaint.strip().rpartition(chr(10))[2], 300)}")


def table(starts: Sequence[Start], *, tokens: int) -> str:
    """Return the results as a Markdown table: medians of seconds, and megabytes."""
    lines = [
        f"| | first token, cold | warm | memory when loaded | after {tokens} tokens |",
        "|---|---:|---:|---:|---:|",
    ]
    for start in starts:
        cold, warm = (f"{median(start.seconds[state]):.2f} s" for state in ("cold", "warm"))
        loaded, done = (_memory_text(start.memory[event]) for event in ("loaded", "done"))
        lines.append(f"| {start.name} | {cold} | {warm} | {loaded} | {done} |")
    return "\n".join([*lines, "", "Memory is anonymous + mapped from files + shared, in MB."])


def _memory_text(memory: dict[str, int]) -> str:
    return " + ".join(f"{memory[kind] / 1e6:.0f}" for kind in _MEMORY)


@click.command("start", help=__doc__.split("\n\n", 1)[0])
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compare with llama.cpp.")
@click.option("--peer-python", default=sys.executable, help="Python with llama-cpp-python.  [default: this one]")
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to write.")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.  [default: all processors]")
def main(bundle: Path, gguf: Path | None, peer_python: str, repetitions: int, tokens: int, threads: int | None) -> None:
    """Measure, and print the table."""
    starts = [Start(f"PMPD {bundle.name}", bundle.absolute(), "bundle")]
    if gguf is not None:
        starts.append(Start(f"llama.cpp {gguf.name}", gguf.absolute(), "gguf", peer_python))
    try:
        measure_start(starts, repetitions=repetitions, tokens=tokens, threads=threads or available_threads())
    except PmpdError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table(starts, tokens=tokens))


if __name__ == "__main__":
    main()
