"""Tasks of the harness on local files: ``python -m pmpd.eval.harness.offline DIR --wikitext FILE --stories FILE …``.

The harness takes its data from the Hugging Face hub. Here each task keeps its own prompts, scores and code, which are
included from the installed harness, and gets other data: ``DIR/NAME_local.yaml`` and ``DIR/NAME_local.jsonl``. Data of
another source make another task, hence the names: compare results only with those of the same files.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click

from pmpd.eval.data.records import Record, read_records
from pmpd.runtime.console.command import FILE, Command
from pmpd.runtime.console.output import write_atomically
from pmpd.runtime.errors import PmpdError

__all__ = ["main", "write_task"]

Documents = Callable[[Iterable[Record]], Iterator[dict[str, Any]]]
_TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def _pages(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Cut WikiText into its articles: each begins with a heading of the first level."""
    for record in records:
        text = record.text("text")
        starts = [match.start() for match in _TITLE.finditer(text)]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            yield {"page": text[start:end]}


def _last_words(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield five sentences of each text, without the last full stop: the last word is to be guessed."""
    for sentences in _openings(records):
        passage = " ".join(sentences).rstrip(".!?")
        if passage[-1:].isalpha():
            yield {"text": passage}


def _two_endings(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield four sentences of each text, and two that may follow: its fifth, and that of the text before it."""
    chance = random.Random(0)
    before = None
    for sentences in _openings(records):
        if before is not None:
            right = chance.choice((1, 2))
            endings = (sentences[4], before) if right == 1 else (before, sentences[4])
            yield {
                **{f"input_sentence_{i + 1}": sentences[i] for i in range(4)},
                **{f"sentence_quiz{i + 1}": endings[i] for i in range(2)},
                "answer_right_ending": right,
            }
        before = sentences[4]


def _openings(records: Iterable[Record]) -> Iterator[list[str]]:
    """Yield the first five sentences of texts that have as many."""
    for record in records:
        sentences = _SENTENCE.split(" ".join(record.text("text").split()))
        if len(sentences) > 5:  # the last one may be cut
            yield sentences[:5]


def _articles(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        yield {"article": record.text("article"), "highlights": record.text("highlights")}


@dataclass(frozen=True)
class _Source:
    """A task of the harness (its file below ``lm_eval/tasks``), and its documents from our records."""

    name: str
    file: str
    documents: Documents


_SOURCES: Mapping[str, tuple[_Source, ...]] = {
    "wikitext": (_Source("wikitext", "wikitext/wikitext.yaml", _pages),),
    "stories": (
        _Source("lambada_openai", "lambada/lambada_openai.yaml", _last_words),
        _Source("storycloze_2016", "storycloze/storycloze_2016.yaml", _two_endings),
    ),
    "articles": (_Source("cnn_dailymail_abisee", "cnn_dailymail/cnn_dailymail.yaml", _articles),),
}


def write_task(folder: Path, source: _Source, records: Iterable[Record], *, limit: int | None = None) -> Path:
    """Write the data and the description of a task; return the description, which ``--tasks`` takes.

    Raises:
        PmpdError: the harness that is installed has no such task, no record makes a document, or a file cannot be
            written.
    """
    import lm_eval

    original = Path(lm_eval.__file__).parent / "tasks" / source.file
    if not original.is_file():
        raise PmpdError(f"{original} does not exist: install a version of lm_eval that has the task {source.name}")
    documents = list(islice(source.documents(records), limit))
    if not documents:
        raise PmpdError(f"the data make no document of the task {source.name}: give texts as README describes them")
    name = f"{source.name}_local"
    data, description = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    write_atomically(data, "".join(f"{json.dumps(document, ensure_ascii=False)}\n" for document in documents))
    fields = {
        "include": str(original),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    lines = (f"{field}: {json.dumps(value)}\n" for field, value in fields.items())  # JSON is YAML
    write_atomically(description, "".join(lines))
    return description


@click.command("python -m pmpd.eval.harness.offline", cls=Command, extra="cpu,eval,harness")
@click.argument("folder", type=FILE)
@click.option("--wikitext", type=FILE, metavar="FILE", help="WikiText, raw: the task wikitext.")
@click.option(
    "--stories",
    type=FILE,
    metavar="FILE",
    help="JSON lines with a field text: the tasks lambada_openai and storycloze_2016.",
)
@click.option(
    "--articles",
    type=FILE,
    metavar="FILE",
    help="JSON lines with article and highlights: the task cnn_dailymail_abisee.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Documents per task.  [default: all]")
def main(folder: Path, limit: int | None, **files: Path | None) -> None:
    """Write tasks of lm-evaluation-harness on local files into FOLDER, and print their names."""
    given_files = {kind: path for kind, path in files.items() if path is not None}
    if not given_files:
        raise PmpdError("there are no data: give --wikitext, --stories or --articles")
    folder.mkdir(parents=True, exist_ok=True)
    for kind, path in given_files.items():
        for source in _SOURCES[kind]:
            click.echo(write_task(folder, source, read_records(path), limit=limit))


if __name__ == "__main__":
    main()
