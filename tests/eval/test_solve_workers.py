"""Workers on Ray: the same results as without them, whoever dies meanwhile, and errors of one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pmpd.eval import Settings, evaluate
from pmpd.eval.measure import workers as workers_module
from pmpd.eval.measure.examiner import Setup
from pmpd.eval.measure.workers import Workers, check_workers
from pmpd.eval.solve.cli import main
from pmpd.runtime import Bundle, MissingExtraError, PmpdError

STARTS = ["Once upon a time, there was", "Tom had a red ball.", "One day, a small bird", "Sara and Ben went to"]
SCHEDULES = ("uniform:4", "static:3@0,2@2", "adaptive:2,4@1")
RUN = "import sys; sys.argv[0] = 'pmpd-schedule'; from pmpd.eval.solve.cli import main; main()"


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray, of the extra `distributed`")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with room for two workers, started once: it takes seconds."""
    if find_spec("ray") is None:
        pytest.skip("needs ray, of the extra `distributed`")
    module = workers_module._import_ray()  # before anybody else: Ray reads the environment once
    module.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    module.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=workers_module.STORE_BYTES,
    )  # fmt: skip
    yield module
    module.shutdown()


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    return copy


@pytest.fixture
def words(bundle: Path, tmp_path: Path) -> list[str]:
    """Arguments of a search; the data have one sample twice."""
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*STARTS, STARTS[0]]), encoding="utf-8")
    options = ["--task", "jsonl", "--data", data, "--prompt-template", "{prompt}", "--max-new-tokens", 9]
    return [str(word) for word in [bundle, *options, "--threads", 1, "--tolerance", "30%", "--dry-run"]]


def search(words: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> str:
    """Return the JSON that a search in a cache of its own prints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    result = CliRunner().invoke(main, [*words, "--json", "-", *map(str, more)], prog_name="pmpd-schedule")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def lines_of(cache: Path) -> list[dict[str, Any]]:
    (file,) = (cache / "pmpd" / "samples").iterdir()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_two_workers_find_what_one_process_does(
    ray: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = search(words, tmp_path / "alone", monkeypatch, "--adaptive")
    assert search(words, tmp_path / "two", monkeypatch, "--adaptive", "--workers", 2) == alone
    kept = [sorted(map(json.dumps, lines_of(tmp_path / name))) for name in ("alone", "two")]
    assert kept[0] == kept[1]


def test_two_workers_learn_what_one_process_does(
    ray: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} {STARTS[i % 4]}" * 4}) + "\n" for i in range(16)), "utf-8")
    options = ["--data", data, "--samples", 16, "--reference", "highest", "--max-new-tokens", 5, "--seeds", 1]
    words = ["learn", *map(str, [bundle, *options, "--threads", 1, "--dry-run"])]
    documents = [
        json.loads(search(words, tmp_path / name, monkeypatch, *more))
        for name, more in (("alone", ()), ("two", ("--workers", 2)))
    ]
    for document in documents:
        del document["milliseconds"], document["share_of_prefill"]
    assert documents[0] == documents[1]


@contextmanager
def killing_the_first() -> Iterator[list[int]]:
    """Kill the first worker as soon as it is ready; yield the processes of all."""
    ready = list[int]()

    class Kill(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("worker ready"):
                ready.append(record.args[1])  # type: ignore[index, arg-type]
                if len(ready) == 1:
                    os.kill(ready[0], signal.SIGKILL)

    handler = Kill()
    logging.getLogger(workers_module.__name__).addHandler(handler)
    try:
        yield ready
    finally:
        logging.getLogger(workers_module.__name__).removeHandler(handler)


def test_a_killed_worker_loses_nothing(
    ray: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = search(words, tmp_path / "alone", monkeypatch)
    with killing_the_first() as ready:
        assert search(words, tmp_path / "killed", monkeypatch, "--workers", 2, "-v") == alone
    assert len(set(ready)) == 3  # two, and one for the dead one
    measured = [(line["item"], name) for line in lines_of(tmp_path / "killed") for name in line["samples"]]
    assert len(measured) == len(set(measured))
    time.sleep(0.5)
    assert "raylet" not in capfd.readouterr().out


def test_two_workers_evaluate_as_one_process(
    ray: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the first worker is killed, of the floating-point model or of the bundle, which needs its logits."""
    caplog.set_level(logging.DEBUG, "pmpd")
    bundle, data = Bundle.open(Path(words[0])), Path(words[4])
    settings = Settings(task="fidelity", data=data, max_new_tokens=5, schedules=SCHEDULES, threads=1)

    def rows_and_files(name: str, workers: int) -> tuple[Any, dict[str, list[bytes]]]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        rows = json.loads(evaluate(bundle, replace(settings, workers=workers)).to_json())["rows"]
        files = (tmp_path / name / "pmpd" / "samples").rglob("*.*")
        return rows, {file.name: sorted(file.read_bytes().splitlines()) for file in files}

    alone = rows_and_files("alone", 1)
    assert sorted(Path(name).suffix for name in alone[1]) == [".jsonl"] * 2 + [".npy"] * len(STARTS)
    with killing_the_first() as ready:
        assert rows_and_files("two", 2) == alone
    assert len(ready) >= 4
    (ours,) = (file for file in (tmp_path / "two").rglob("*.jsonl") if '"fp"' not in file.read_text(encoding="utf-8"))
    ours.unlink()
    with killing_the_first() as ready:
        assert rows_and_files("two", 2) == alone
    assert len(ready) in (2, 3)


def test_a_job_that_kills_every_worker_is_one_clear_line(ray: Any, tmp_path: Path) -> None:
    with Workers(2, partial(prepare_doubling, folder=tmp_path)) as pool:
        doubled = pool.run({"a": 1, "b": 2, "c": -3})
        finished = dict([next(doubled), next(doubled)])
        with pytest.raises(PmpdError, match=r"job c: 3 workers died over it: give fewer workers if memory is short"):
            dict(pool.run({"c": -3}, name="job {}".format))
    assert finished == {"a": 2, "b": 4}
    assert len(list(tmp_path.iterdir())) >= 3


def prepare_doubling(threads: int, folder: Path) -> Callable[[int], int]:
    def compute(job: int) -> int:
        if job < 0:
            (folder / f"{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * job

    return compute


def test_an_error_in_a_worker_is_as_without_workers(ray: Any) -> None:
    missing = "x is not installed: run `pip install 'pmpd[text]'`"
    with Workers(1, prepare_failing) as pool:
        with pytest.raises(PmpdError) as caught:
            dict(pool.run({0: "PmpdError"}))
        assert str(caught.value) == "too long: give less"
        with pytest.raises(PmpdError) as caught:
            dict(pool.run({0: "MissingExtraError"}))
        assert str(caught.value) == missing
        with pytest.raises(ZeroDivisionError) as divided:
            dict(pool.run({0: "ZeroDivisionError"}))
        assert "in compute" in str(divided.value.__cause__)
        assert dict(pool.run({0: "nothing"})) == {0: "nothing"}  # by the same worker


def prepare_failing(threads: int) -> Callable[[str], str]:
    errors = {
        "PmpdError": PmpdError("too long: give less"),
        "MissingExtraError": MissingExtraError("x", "text"),
        "ZeroDivisionError": ZeroDivisionError(),
    }

    def compute(job: str) -> str:
        if job in errors:
            raise errors[job]
        return job

    return compute


def test_what_a_worker_says_on_the_way_is_said_once(ray: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pmpd")
    with Workers(2, prepare_warning) as pool:
        assert dict(pool.run(dict.fromkeys(range(4), 1))) == dict.fromkeys(range(4), 1)
        assert dict(pool.run({"x": 2})) == {"x": 2}
    assert [record.getMessage() for record in caplog.records] == ["the slow kernels run"]


def prepare_warning(threads: int) -> Callable[[int], int]:
    logging.getLogger("pmpd.runtime").warning("the slow kernels run")
    time.sleep(0.2)
    return int


def test_a_cluster_that_is_too_small(ray: Any) -> None:
    message = r"has 2 processors on 1 nodes, not enough for 2 workers of 2 threads"
    with Workers(2, prepare_warning, threads=2) as pool, pytest.raises(PmpdError, match=message):
        dict(pool.run({0: 0}))


def test_a_worker_with_another_bundle_is_refused(
    ray: Any, words: list[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "file", lambda *_, **__: tmp_path / "cache" / "other.jsonl")
    result = CliRunner().invoke(main, [*words, "--workers", "2", "-q"], prog_name="pmpd-schedule")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {bundle} on {socket.gethostname()} would give other answers: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_cluster_at_an_address(ray: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = search(words, tmp_path / "alone", monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cluster"))
    address = ray.get_runtime_context().gcs_address
    process = command(*words, "--json", "-", "--workers", 2, "--address", address, "-q")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == alone


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, timeout=200, check=False
    )


@needs_ray
@pytest.mark.full
def test_nobody_at_the_address(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        process = command(*words, "--address", address, "-q")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        f"error: no Ray cluster at {address} (Connection refused): start one there with `ray start --head`\n"
    )


@needs_ray
@pytest.mark.full
def test_somebody_else_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 3)
    message = r"no Ray cluster at 127.0.0.1:\d+ \(no answer within 3 seconds\)"
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(PmpdError, match=message):
        workers_module._probe(f"127.0.0.1:{server.getsockname()[1]}")


@needs_ray
@pytest.mark.full
@pytest.mark.interruptible
def test_an_interrupt_ends_the_workers(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *words, "--exact", "--max-new-tokens", "200", "--workers", "2", "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(120, process.kill)
    killer.start()
    assert process.stderr is not None
    workers = list[int]()
    try:
        for line in process.stderr:
            if line.startswith("worker ready"):
                workers.append(int(line.split("process ")[1].split(",")[0]))
                break
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        stdout, stderr = process.communicate()
        seconds = time.monotonic() - begin
    finally:
        killer.cancel()
        process.kill()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == (
        "error: interrupted: the bundle is as it was; the same command goes on with what is measured"
    )
    assert seconds < 20
    for number in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed: run `pip install 'pmpd\[distributed\]'`"):
        Workers(2, prepare_warning)


@pytest.mark.parametrize(
    ("count", "address", "message"),
    [
        (0, None, "workers must be 1 or more, got 0"),
        (5000, None, "workers must be at most 1024, got 5000"),
        (1, "nowhere", "address 'nowhere': give HOST:PORT of a Ray cluster"),
        (1, "ray://host:10001", "address 'ray://host:10001': give HOST:PORT of a Ray cluster"),
    ],
)
def test_mistakes(count: int, address: str | None, message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        check_workers(count, address)
