"""Data files and prompt templates, good and bad."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pmpd.eval.data.records import Record, Template, read_records
from pmpd.runtime import PmpdError

RECORD = Record("f.jsonl:3", {"dialogue": "hi", "turns": ["one", "two"], "n": 7, "none": None})


def test_reads_json_lines_with_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": "é"}\n\n{"x": "b"}\n', encoding="utf-8")
    assert list(read_records(file)) == [Record("a.jsonl:1", {"x": "é"}), Record("a.jsonl:3", {"x": "b"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path, name: str) -> None:
    """Many Windows editors write one in front of the first line."""
    file, text = tmp_path / name, b'\xef\xbb\xbf{"x": 1}\n'
    file.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    fields = {"x": 1} if ".jsonl" in name else {"text": '{"x": 1}\n'}
    assert [record.fields for record in read_records(file)] == [fields]


def test_reads_compressed_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"x": 1}\n'))
    assert list(read_records(file)) == [Record("a.jsonl.gz:1", {"x": 1})]


@pytest.mark.parametrize("name", ["wiki.test.raw", "a.txt", "a.txt.gz", "noending"])
def test_any_other_file_is_one_text(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(b"x\ny\n") if name.endswith("gz") else b"x\ny\n")
    assert list(read_records(file)) == [Record(name, {"text": "x\ny\n"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": ', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1 is not a JSON object but \[1, 2\]"),
        ("a.jsonl", b'{"x": "\xff"}\n', "is not UTF-8"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 1000, mtime=0)[:40], "cannot be read"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(PmpdError, match=message) as error:
        list(read_records(file))
    assert "\n" not in str(error.value)


def test_template_renders_fields_items_and_braces() -> None:
    assert Template("{{{dialogue}}}\n{turns[1]} {n}").render(RECORD) == "{hi}\ntwo 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no field", r"has no \{field\}"),
        ("{open", "expected '}'"),
        ("{a.__class__}", "not of the form"),
        ("{a!r}", "not of the form"),
        ("{a:>9}", "not of the form"),
        ("{}", "not of the form"),
    ],
)
def test_bad_templates_are_refused_at_once(text: str, message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        Template(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{dialog}", r"f\.jsonl:3: unknown field 'dialog': choose one of dialogue, "),
        ("{turns}", r"f\.jsonl:3: field 'turns' is not text"),
        ("{turns[2]}", r"f\.jsonl:3: field 'turns' has no item 2"),
        ("{none}", "is not text but None"),
    ],
)
def test_a_record_that_does_not_fit_is_named(text: str, message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        Template(text).render(RECORD)
