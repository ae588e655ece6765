"""Output of commands: files in one step, and foreign text in messages."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.runtime.console.output import byte_text, check_writable, write_atomically
from pmpd.runtime.errors import PmpdError, one_line, unknown_choice


def test_a_new_file_has_the_usual_permissions_and_leaves_nothing_else(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    write_atomically(tmp_path / "new", "text")
    assert (tmp_path / "new").read_text() == "text"
    assert (tmp_path / "new").stat().st_mode == usual.stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"usual", "new"}


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o600)
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a device")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no devices can be made here")
    write_atomically(device, "gone")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert device.stat().st_rdev == os.makedev(1, 3)


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()), daemon=True)
    reader.start()
    write_atomically(fifo, "through")
    reader.join(timeout=10)
    assert read == ["through"]
    assert fifo.is_fifo()


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "file", "No such file or directory"),
        (loop, "Too many levels of symbolic links"),
    ):
        with pytest.raises(PmpdError) as error:
            write_atomically(path, "x")
        assert str(error.value) == f"cannot write {path} ({reason}): choose another place"


@given(st.text(st.characters(), max_size=700), st.integers(20, 400))
def test_one_line_is_one_line(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit


def test_one_line_keeps_short_text_and_both_ends_of_long_text() -> None:
    assert one_line("cosine 0.97 < 0.99") == "cosine 0.97 < 0.99"
    assert one_line("first\n\tsecond\x1b[31m") == "first second [31m"
    long = one_line(f"begin{'x' * 100_000}end")
    assert (long[:5], long[-3:], len(long)) == ("begin", "end", 300)


def test_an_unknown_choice_is_short() -> None:
    assert unknown_choice("thing", "a\nb", ["a", "b"]).startswith("unknown thing 'a b': choose one of ")
    assert len(unknown_choice("thing", "x" * 100_000, ["a"])) < 200
    assert unknown_choice("thing", "x", []) == "unknown thing 'x': choose one of "


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (9_345_678, "9.35 MB"),
        (99_600_000, "99.6 MB"),
        (999_600_000, "1.00 GB"),
        (1_234_000_000_000, "1234 GB"),
    ],
)
def test_sizes_have_the_unit_that_suits_them(size: float, text: str) -> None:
    assert byte_text(size) == text


def test_a_result_is_checked_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    check_writable(Path("relative-name"))
    check_writable(Path(os.devnull))
    with pytest.raises(PmpdError, match="is a folder: give the name of a file"):
        check_writable(tmp_path)
    with pytest.raises(PmpdError, match="there is no folder"):
        check_writable(tmp_path / "no" / "file")
