"""What all tests share: the four tiers, folders made once per run, and the exported demo model.

Every test is in exactly one tier, and most need no mark for it:

- `fast`: what is not in another tier. `make test-fast` fails a fast test that takes more than its CPU seconds.
- `full`: tests that use a module or session fixture of ours (something too expensive to make for each test), and tests
  marked `full`.
- `slow`: tests marked `slow`.
- `real`: everything below `tests/real`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# The first call of a property also pays for imports and session start-up: a deadline would measure those.
settings.register_profile("pmpd", deadline=None)
settings.load_profile("pmpd")

TESTS = Path(__file__).parent
PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
# Makes a folder once per run: `once(name, build)` calls `build(folder)` in the first process that asks.
Once = Callable[[str, Callable[[Path], object]], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast-limit", type=float, default=0, metavar="SECONDS", help="CPU seconds a test of the tier `fast` may take"
    )


def pytest_configure() -> None:
    """Give each of several test processes a share of the processors, and all of them one cache of the compiler.

    Threads wait for each other by spinning: two test processes with two threads each on two processors spend a third
    of their time on that. This runs before anything that counts processors is imported; children inherit it.
    """
    # Tests with a cache of their own need no C library of their own: zig takes eight seconds to make one.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache / "zig"))
    number, count = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "")
    share = sorted(PROCESSORS)[int(number.removeprefix("gw")) :: int(count)] if number else []
    if share:  # with more test processes than processors there is nothing to share out
        os.sched_setaffinity(0, share)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = tier_of(item)
        if tier == "slow" and item.get_closest_marker("full"):  # `make test` would run it
            raise pytest.UsageError(f"{item.nodeid} is marked full and slow: a test is in one tier")
        item.add_marker(tier)


def tier_of(item: pytest.Item) -> str:
    """Return the tier of a test."""
    if item.path.is_relative_to(TESTS / "real"):
        return "real"
    if item.get_closest_marker("slow"):
        return "slow"
    return "full" if item.get_closest_marker("full") or shares_a_fixture(item) else "fast"


def shares_a_fixture(item: pytest.Item) -> bool:
    """Whether a test uses a fixture of this project that is made for more than one test."""
    definitions = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    return any(
        definition.scope in ("module", "package", "session") and not definition.func.__module__.startswith("_pytest.")
        for stack in definitions
        for definition in stack
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    begin = cpu_seconds()
    yield
    limit = item.config.getoption("--fast-limit")
    if limit and item.get_closest_marker("fast") and (spent := cpu_seconds() - begin) > limit:
        pytest.fail(f"this test took {spent:.1f} CPU seconds, a fast one may take {limit:g}: mark it @pytest.mark.full")


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended: other load does not count."""
    return sum(os.times()[:4])


@pytest.fixture(autouse=True)
def interruptible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the children of tests marked `interruptible` be interrupted, even where this run ignores signals.

    A run in the background (`make test &`, many CI services) ignores SIGINT and one below nohup SIGHUP, and children
    inherit that. What they do not inherit is a handler in Python.
    """
    if request.node.get_closest_marker("interruptible") is None:
        yield
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def all_processors() -> Iterator[None]:
    """Use every processor: for threads that should meet, or that should be seen to rest."""
    if not PROCESSORS:
        yield
        return
    share = os.sched_getaffinity(0)
    os.sched_setaffinity(0, PROCESSORS)
    yield
    os.sched_setaffinity(0, share)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Undo what a command that ran in this process did to the levels of the loggers, as `-q` does."""
    loggers = logging.getLogger(), logging.getLogger("pmpd")
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make folders that all processes of a test run share. Tests copy what they want to change."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what another process failed at
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def demo_bundle(once: Once) -> Path:
    """The demo model at 4, 3 and 2 bits, without kernels. Tests copy it before they change anything."""

    def export(folder: Path) -> None:
        from pmpd.exporter.config import ExportConfig
        from pmpd.exporter.pipeline import export_bundle

        config = ExportConfig(
            model="demo", output=folder / "demo-pmpd", precisions=(4, 3, 2), calibration="none", targets=()
        )
        export_bundle(config)

    return once("demo", export) / "demo-pmpd"
