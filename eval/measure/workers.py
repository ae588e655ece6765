"""Processes that compute jobs side by side, on this machine or on a Ray cluster (https://docs.ray.io).

A worker opens what it computes with by itself, from plain values such as the path of a bundle, and then takes one job
after the other. A worker that dies is replaced and its job is given to another, so nothing that was finished is lost.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from collections.abc import Generator as Iterating
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pmpd.runtime.engine.threads import available_threads, check_threads
from pmpd.runtime.errors import MissingExtraError, PmpdError, one_line

__all__ = ["Workers", "check_workers"]

Key = TypeVar("Key")
Job = TypeVar("Job")
Result = TypeVar("Result")
log = logging.getLogger(__name__)

ATTEMPTS = 3  # workers that one job may take with it
MAX_WORKERS = 1024
CONNECT_SECONDS = 30
PATIENCE_SECONDS = 60  # before a line says that the cluster has not started a worker
STORE_BYTES = 80 << 20  # shared memory for jobs and results; Ray's default is a third of the machine's
# Ray reads these when it is imported or started: no usage statistics, no listening beyond this machine (Linux heeds the
# second too, whatever its name), nothing of its own on our stdout, and the priority of any other process.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_worker_niceness": "0",
}
# `ray.init` tries an address for minutes and cannot be interrupted meanwhile; a process can be ended.
PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)"


def check_workers(count: int, address: str | None) -> None:
    """Check how many workers are wanted, and where.

    Raises:
        PmpdError: the count is out of range, or the address has another form than HOST:PORT.
    """
    if not 1 <= count <= MAX_WORKERS:
        raise PmpdError(f"workers must be {'1 or more' if count < 1 else f'at most {MAX_WORKERS}'}, got {count}")
    if address is not None and not re.fullmatch(r"[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
        raise PmpdError(
            f"address {address!r:.100}: give HOST:PORT of a Ray cluster that this machine is a node of, such as "
            "127.0.0.1:6379"
        )


class Workers(Generic[Job, Result]):
    """A number of processes that compute jobs. They start when the first job is there, and end with `close`.

    Where the application has called `ray.init` itself, its Ray is used and left running.

    Args:
        count: how many.
        prepare: called in each worker with the number of its threads; returns what computes a job. It is sent to the
            workers, and so must be a function of an installed module, or a partial one with plain arguments.
        address: HOST:PORT of a Ray cluster that this machine is a node of; None starts Ray on this machine alone.
        threads: that each worker computes with; default all processors, shared out evenly.

    Raises:
        PmpdError: a value out of range.
        MissingExtraError: Ray is not installed.
    """

    def __init__(
        self,
        count: int,
        prepare: Callable[[int], Callable[[Job], Result]],
        *,
        address: str | None = None,
        threads: int | None = None,
    ) -> None:
        check_workers(count, address)
        self._count, self._prepare, self._address = count, prepare, address
        self._threads = threads and check_threads(threads)
        self._ray = _import_ray()
        self._started = self._owned = False
        self._create: Callable[[], Any]
        self._idle = list[Any]()
        self._tasks = dict[Any, tuple[Any, Any]]()  # what runs: the actor and the key of its job, None for no job
        self._notes = set[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, jobs: Mapping[Key, Job], *, name: Callable[[Key], str] = str) -> Iterating[tuple[Key, Result]]:
        """Yield the key and the result of each job, as soon as it is computed.

        Args:
            jobs: what to compute.
            name: what a message calls a job.

        Raises:
            PmpdError: one that was raised in a worker; the cluster cannot be reached or is too small; or a job whose
                workers died, several in a row.
        """
        if jobs and not self._started:
            self._start()
        waiting, deaths = deque(jobs), Counter[Any]()
        try:
            while waiting or any(key is not None for _, key in self._tasks.values()):
                while waiting and self._idle:
                    actor, key = self._idle.pop(), waiting.popleft()
                    self._tasks[actor.run.remote(jobs[key])] = actor, key
                task = self._next()
                actor, key = self._tasks.pop(task)
                try:
                    answer = self._ray.get(task)
                except self._ray.exceptions.RayActorError as error:
                    deaths[key] += 1
                    self._replace(error, deaths[key], "" if key is None else name(key))
                    if key is not None:
                        waiting.appendleft(key)
                    continue
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    raise error.cause from error
                self._idle.append(actor)
                if isinstance(answer, _Refused):
                    raise PmpdError(answer.message)
                if isinstance(answer, _Ready):
                    self._greet(answer)
                elif key is not None:
                    yield key, answer
        finally:  # what still runs belongs to nobody
            self._tasks = {task: (actor, None) for task, (actor, _) in self._tasks.items()}

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        actors = [*self._idle, *(actor for actor, _ in self._tasks.values())]
        self._idle, self._tasks, self._started = [], {}, False
        for actor in actors:
            with suppress(Exception):
                self._ray.kill(actor)
        if self._owned:
            self._owned = False
            self._ray.shutdown()

    def _start(self) -> None:
        if self._ray.is_initialized():
            threads = self._share()
        elif self._address is not None:
            _probe(self._address)
            self._init(address=self._address)
            threads = self._share()
        else:
            processors = available_threads()
            if self._count > processors:
                log.warning(
                    "%d workers share %d processors: more workers than processors are slower",
                    *(self._count, processors),
                )
            threads = self._threads or max(1, processors // self._count)
            log.debug("starting Ray on this machine")
            self._init(
                address="local",
                num_cpus=self._count * threads,
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
            )
        self._started = True
        kind = self._ray.remote(_Worker).options(num_cpus=threads, max_restarts=0)
        self._create = partial(kind.remote, self._prepare, threads)
        for _ in range(self._count):
            self._add()

    def _init(self, **options: Any) -> None:
        """Start or join a Ray; its handler of SIGTERM, which ends the process at once, is not wanted."""
        self._owned = True
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(log_to_driver=False, configure_logging=False, **options)
        except (RuntimeError, ConnectionError, ValueError, OSError) as error:
            raise PmpdError(f"Ray does not start: {one_line(error)}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _share(self) -> int:
        """Return the threads of a worker: the most with which the nodes of the cluster hold all workers."""
        nodes = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        choices = [self._threads] if self._threads else range(1, max(nodes, default=0) + 1)
        fitting = [threads for threads in choices if sum(node // threads for node in nodes) >= self._count]
        if not fitting:
            raise PmpdError(
                f"the Ray cluster has {sum(nodes)} processors on {len(nodes)} nodes, not enough for {self._count} "
                f"workers of {self._threads or 1} threads: give fewer workers or threads"
            )
        return max(fitting)

    def _add(self) -> None:
        """Start a worker."""
        actor = self._create()
        self._tasks[actor.start.remote()] = actor, None

    def _next(self) -> Any:
        """Return a task that has ended."""
        done, _ = self._ray.wait(list(self._tasks), timeout=PATIENCE_SECONDS)
        if not done and not self._idle and all(key is None for _, key in self._tasks.values()):
            log.warning("no worker has started yet: the processors of the cluster may be in use")
        return (done or self._ray.wait(list(self._tasks))[0])[0]

    def _replace(self, error: Exception, deaths: int, job: str) -> None:
        """Start another worker for one that died, unless too many did."""
        log.debug("a worker died%s: %s", f" at {job}" if job else "", one_line(error))
        if deaths == ATTEMPTS:
            where = f"{job}: {deaths} workers died over it" if job else f"{deaths} workers died before they could start"
            reason = one_line(str(error).strip().splitlines()[-1], 200)
            raise PmpdError(f"{where}: give fewer workers if memory is short (-v has details; Ray says: {reason})")
        self._add()

    def _greet(self, ready: _Ready) -> None:
        log.debug("worker ready: %s, process %d, %d threads", ready.host, ready.process, ready.threads)
        for level, message in ready.notes:
            if message not in self._notes:  # all workers say the same
                self._notes.add(message)
                log.log(level, "%s", message)


@dataclass(frozen=True)
class _Refused:
    """A PmpdError of a worker. It travels as its message: not every subclass can be sent."""

    message: str


@dataclass(frozen=True)
class _Ready:
    """A worker that can take jobs: where it runs, and what it logged on the way (level, message)."""

    host: str
    process: int
    threads: int
    notes: tuple[tuple[int, str], ...]


class _Worker:
    """What runs in a worker's process."""

    def __init__(self, prepare: Callable[[int], Callable[[Any], Any]], threads: int) -> None:
        self._prepare, self._threads = prepare, threads

    def start(self) -> _Ready | _Refused:
        """Open what jobs are computed with."""
        notes = _Notes()
        logging.getLogger("pmpd").addHandler(notes)
        try:
            self._compute = self._prepare(self._threads)
        except PmpdError as error:
            return _Refused(str(error))
        finally:
            logging.getLogger("pmpd").removeHandler(notes)
        return _Ready(socket.gethostname(), os.getpid(), self._threads, tuple(notes.lines))

    def run(self, job: Any) -> Any:
        """Compute a job."""
        try:
            return self._compute(job)
        except PmpdError as error:
            return _Refused(str(error))


class _Notes(logging.Handler):
    """Keeps the lines that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines = list[tuple[int, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def _import_ray() -> Any:
    """Return the module `ray`, which keeps quiet from here on."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "distributed") from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


def _probe(address: str) -> None:
    """Check that a Ray cluster answers at an address, within `CONNECT_SECONDS`.

    Raises:
        PmpdError: it does not, or it is of another version.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CONNECT_SECONDS,
            check=False,
        )
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {CONNECT_SECONDS} seconds"
    else:
        if probe.returncode == 0:
            return
        reason = (probe.stderr.strip().splitlines() or ["it does not answer"])[-1]
    raise PmpdError(f"no Ray cluster at {address} ({one_line(reason)}): start one there with `ray start --head`")
