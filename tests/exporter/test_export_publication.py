"""A bundle appears at its output in one step, and nothing else that is or was there gets lost."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_models import TINY_MODELS

from pmpd.exporter import Export, ExportConfig, export_bundle, export_skeleton, pipeline
from pmpd.exporter.bundle import lock
from pmpd.exporter.bundle.workspace import Workspace
from pmpd.exporter.cli import main
from pmpd.runtime import Bundle
from pmpd.runtime.errors import PmpdError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["llama"].save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> ExportConfig:
    """An export that takes a moment; `verified` is what users get."""
    return ExportConfig(
        model=str(tiny), output=tmp_path / "bundle", precisions=(2,), head_precision=2, targets=(), verify=False
    )


@pytest.fixture
def verified(small: ExportConfig) -> ExportConfig:
    return replace(small, verify=True)


def before_publication(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something when a bundle is finished, before it is published."""
    publish = Workspace.publish

    def act_and_publish(workspace: Workspace) -> None:
        action()
        publish(workspace)

    monkeypatch.setattr(Workspace, "publish", act_and_publish)


def groups(output: Path) -> int:
    """Return an option that the bundle at an output was exported with, and check that the bundle is whole."""
    number = Bundle.open(output, verify=True).manifest.configuration["groups"]
    assert isinstance(number, int)
    return number


def thesis(folder: Path) -> Path:
    """Make a folder that is not a bundle."""
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    return folder / "thesis.txt"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_made_during_an_export_is_kept(
    overwrite: bool, small: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_publication(patch, lambda: thesis(small.output))
        with pytest.raises(PmpdError, match=r"bundle was created or changed by another program .* move it away"):
            export_bundle(replace(small, overwrite=overwrite))
    assert (small.output / "thesis.txt").read_text() == "mine"
    shutil.rmtree(small.output)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write", None)  # nothing is done again
        export_bundle(small)
    Bundle.open(small.output, verify=True)
    assert [path.name for path in small.output.parent.iterdir()] == ["bundle"]


def test_a_folder_made_at_the_last_moment_is_kept(small: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look at the output and the renaming."""
    rename = Path.rename

    def late(source: Path, target: Path) -> Path:
        if target == small.output:
            thesis(target)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(PmpdError, match="was created or changed by another program"):
        export_bundle(small)
    assert (small.output / "thesis.txt").read_text() == "mine"


def test_two_exports_with_other_options_do_not_share_an_output(
    small: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_again() -> None:
        for other in replace(small, groups=2), replace(small, groups=2, overwrite=True):
            with pytest.raises(PmpdError, match=r"another export is writing .*bundle: wait for it or end it"):
                export_bundle(other)
        with pytest.raises(PmpdError, match="another export is writing"):
            export_skeleton(ExportConfig(model=small.model, output=small.output))

    before_publication(monkeypatch, export_again)
    export_bundle(small)
    assert groups(small.output) == 1


def test_overwrite_replaces_only_the_bundle_that_was_there_when_the_export_began(
    small: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(small, output=small.output.with_name("other"), groups=2)
    export_bundle(small)
    export_bundle(other)

    def exchange() -> None:
        shutil.rmtree(small.output)
        other.output.rename(small.output)

    with monkeypatch.context() as patch:
        before_publication(patch, exchange)
        with pytest.raises(PmpdError, match="was created or changed by another program"):
            export_bundle(replace(small, overwrite=True))
    assert groups(small.output) == 2
    export_bundle(replace(small, overwrite=True))
    assert groups(small.output) == 1
    assert [path.name for path in small.output.parent.iterdir()] == ["bundle"]


def killed_at_rename(number: int, config: ExportConfig) -> None:
    """Export, and stop dead at a rename of the publication, counted from 0, or behind the last one."""
    rename, calls = Path.rename, 0

    def counted(source: Path, target: Path) -> Path:
        nonlocal calls
        if calls == number:
            raise KeyboardInterrupt
        calls += 1
        return rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        if number > 1:
            patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(config)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_kill_in_a_replacement_leaves_a_bundle_and_the_next_export_cleans_up(
    number: int, small: ExportConfig
) -> None:
    export_bundle(small)
    wanted = replace(small, groups=2, overwrite=True)
    killed_at_rename(number, wanted)
    with pytest.raises(PmpdError, match="exists: choose another --output"):
        export_bundle(replace(wanted, overwrite=False))
    assert groups(small.output) == (1 if number < 2 else 2)
    export_bundle(wanted)
    assert groups(small.output) == 2
    assert [path.name for path in small.output.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_after_publication_leaves_nothing_of_the_work_in_the_bundle(
    overwrite: bool, small: ExportConfig
) -> None:
    if overwrite:
        export_bundle(small)
    killed_at_rename(9, replace(small, overwrite=overwrite))
    files = {path.relative_to(small.output).as_posix() for path in small.output.rglob("*")}
    assert files == {*Bundle.open(small.output, verify=True).manifest.files, "bundle.json"}


def test_everything_is_on_disk_before_the_bundle_appears(
    verified: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename = os.fsync, Path.rename
    flushed: set[str] = set()

    def noting(descriptor: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def checking(source: Path, target: Path) -> Path:
        assert flushed >= {source.name, *(path.name for path in source.iterdir())}
        flushed.clear()
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", checking)
    export_bundle(verified)
    assert flushed == {verified.output.parent.name}


def test_the_current_folder_is_not_replaced(small: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    export_bundle(small)
    monkeypatch.chdir(small.output)
    for output in (".", str(small.output)):
        result = CliRunner().invoke(main, ["-q", "-m", small.model, "-o", output, "--overwrite", "--target", "none"])
        assert result.exit_code == 1
        assert "is the current folder or contains it: run from outside" in result.stderr
        assert result.stderr.count("\n") == 1
    assert groups(small.output) == 1


def test_an_output_that_is_a_link_to_a_bundle_replaces_the_bundle(small: ExportConfig, tmp_path: Path) -> None:
    export_bundle(small)
    link = tmp_path / "link"
    link.symlink_to(small.output)
    export_bundle(replace(small, output=link, groups=2, overwrite=True))
    assert link.is_symlink()
    assert groups(small.output) == 2


def test_a_folder_with_some_other_bundle_json_is_not_replaced(small: ExportConfig) -> None:
    thesis(small.output)
    (small.output / "bundle.json").write_text('{"name": "website"}')
    with pytest.raises(PmpdError, match="is not a bundle, and --overwrite replaces only bundles"):
        export_bundle(replace(small, overwrite=True))
    assert (small.output / "thesis.txt").exists()


def test_the_weights_are_hashed_once(verified: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmpd.exporter import outline

    hashed: list[str] = []
    sha256_of = outline.sha256_of
    monkeypatch.setattr(outline, "sha256_of", lambda file: (hashed.append(file.name), sha256_of(file))[1])
    export_bundle(verified)
    assert hashed.count("weights.bin") == 1
    Bundle.open(verified.output, verify=True)


def test_what_is_on_disk_counts_when_an_export_resumes(
    small: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(small)
    size = Export.prepare(small).plan.size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size // 2))
    export_bundle(small)
    with pytest.raises(PmpdError, match=r"free, the bundle takes .* more"):
        Export.prepare(replace(small, output=tmp_path / "another"))


@pytest.mark.parametrize("change", ["code", "tensor table"])
def test_work_of_other_code_is_not_resumed(change: str, small: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmpd.exporter.bundle import fingerprint, plan

    before = Export.prepare(small).fingerprint
    assert Export.prepare(small).fingerprint == before
    if change == "code":
        monkeypatch.setattr(pipeline, "code_digest", lambda _: "other")
    else:
        monkeypatch.setattr(plan, "CACHE_LINE", 128)
    assert Export.prepare(small).fingerprint != before
    files = [place.name for place in fingerprint.WEIGHTS_CODE if place.exists()]
    assert {"quantize", "nn", "arch", "layers.py", "plan.py", "bitplanes.py"} < set(files)


def test_the_digest_of_code_follows_every_file(tmp_path: Path) -> None:
    from pmpd.exporter.bundle.fingerprint import code_digest

    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("1")
    seen = {code_digest([tmp_path / "room"])}
    (tmp_path / "room" / "a.py").write_text("2")
    seen.add(code_digest([tmp_path / "room"]))
    (tmp_path / "room" / "a.py").rename(tmp_path / "room" / "b.py")
    seen.add(code_digest([tmp_path / "room"]))
    seen.add(code_digest([tmp_path / "room" / "b.py"]))
    assert len(seen) == 4


def test_a_kill_while_the_journal_is_opened_loses_nothing(small: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(small)
    (journal,) = small.output.parent.glob("*.partial*/**/*journal")
    lines = journal.read_text()
    with monkeypatch.context() as patch:

        def kill(path: Path, *_: Any, **__: Any) -> None:
            path.open("w").close()  # as opening a file to rewrite it does
            raise KeyboardInterrupt

        patch.setattr(Path, "write_text", kill)
        patch.setattr(Path, "write_bytes", kill)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(small)
    assert journal.read_text() == lines


def test_a_failed_verification_says_where_the_work_is_and_what_to_do(
    small: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise PmpdError("verification failed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Verification", fail)
        with pytest.raises(PmpdError) as caught:
            export_bundle(replace(small, verify=True))
    (folder,) = (path for path in (small.output.parent / "bundle.partial").iterdir() if path.is_dir())
    assert f"{folder} keeps the quantized weights (" in str(caught.value)
    assert "delete it" in str(caught.value)
    monkeypatch.setattr(Workspace, "write", None)  # nothing is quantized again
    export_bundle(replace(small, schedule="uniform:2"))
    assert not Bundle.open(small.output, verify=True).manifest.verified


def test_a_bundle_does_not_say_where_the_model_was(small: ExportConfig, tmp_path: Path) -> None:
    home = tmp_path / "alice" / "secret-project"
    shutil.copytree(small.model, home / "tiny")
    export_bundle(replace(small, model=str(home / "tiny")))
    export_skeleton(ExportConfig(model=str(home / "tiny"), output=tmp_path / "skeleton"))
    for bundle in small.output, tmp_path / "skeleton":
        manifest = Bundle.open(bundle, skeleton=True).manifest
        assert (manifest.source.model, manifest.configuration["model"]) == ("tiny", "tiny")
        for file in bundle.rglob("*"):
            assert file.is_dir() or b"alice" not in file.read_bytes()


def load_lock(monkeypatch: pytest.MonkeyPatch, **fake: Any) -> Any:
    """Load the module as Windows would, where there is `msvcrt` and not `fcntl`."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, **fake))
    spec = importlib.util.spec_from_file_location("windows_lock", lock.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_needs_no_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def locking(_: int, mode: int, count: int) -> None:
        calls.append(mode)
        if len(calls) > 1:
            raise OSError(errno.EACCES, "locked")

    module = load_lock(monkeypatch, locking=locking)
    with module.open_locked(tmp_path / "lock"), pytest.raises(BlockingIOError):
        module.open_locked(tmp_path / "lock")
    assert calls == [2, 2]


def test_options_that_make_a_bundle_slow_or_large_are_pointed_out(
    small: ExportConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="pmpd")
    many = replace(small, groups=4, targets=("x86-64-v3",))
    export = Export.prepare(many)
    assert "warning   groups 4: only the generic kernel" in caplog.text
    assert any("x86-64-v3: exact, generic (slow)" in line for line in export.describe())
    with pytest.raises(PmpdError, match="groups 4: int8 kernels take one codebook per row"):
        replace(many, accuracy="int8")
    caplog.clear()
    Export.prepare(replace(small, precisions=(8,), head_precision=8))
    assert "is larger than the checkpoint" in caplog.text
