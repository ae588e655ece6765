"""What a process loads once: several conversations over it, devices, threads, and failures while running."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from pmpd.runtime import Bundle, BundleError, Engine, Generator, PmpdError, Tokenizer
from pmpd.runtime.engine.device import Cpu, open_device
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.threads import available_threads, cgroup_quota
from pmpd.runtime.format.manifest import KvContract

TEXTS = ("Once upon a time, there was a cat.", "The dog ran to the big tree.", "Lily and Ben like to play.")


@pytest.fixture(scope="module")
def engine(demo_bundle: Path) -> Engine:
    return Engine(Bundle.open(demo_bundle))


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> Tokenizer:
    return Tokenizer.from_bundle(engine.bundle)


@pytest.mark.usefixtures("all_processors")
def test_conversations_of_several_threads_share_an_engine_and_nothing_else(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    def answer(generator: Generator, k: int) -> str:
        return generator.generate(TEXTS[k], max_new_tokens=12, schedule="static:3@3,2@6").text

    alone = Generator(engine.bundle, context_length=64, tokenizer=tokenizer)
    want = [answer(alone, k) for k in range(len(TEXTS))]
    generators = [Generator.on(engine, context_length=64, tokenizer=tokenizer) for _ in TEXTS]
    assert len({id(generator.engine) for generator in generators}) == 1
    barrier, texts = threading.Barrier(len(TEXTS)), [list[str]() for _ in TEXTS]

    def run(k: int) -> None:
        barrier.wait(30)
        texts[k] += [answer(generators[k], k) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert texts == [[text] * 4 for text in want]


def test_closing_one_conversation_leaves_the_others(engine: Engine, tokenizer: Tokenizer) -> None:
    first, second = (Generator.on(engine, context_length=32, tokenizer=tokenizer) for _ in range(2))
    first.generate("A", max_new_tokens=2)
    first.close()
    assert len(second.generate("A", max_new_tokens=2).tokens) == 2


def test_devices(engine: Engine) -> None:
    assert engine.device.name == "cpu"
    with pytest.raises(PmpdError, match="unknown device 'cuda': choose one of cpu"):
        Engine(engine.bundle, device="cuda")
    buffer = open_device("cpu").allocate((2, 3), np.float16)
    buffer.array[1, 2] = 5
    assert buffer.value.numpy()[1, 2] == 5  # the same memory
    with pytest.raises(MemoryError):
        Cpu().reserve(2**62)


def test_views_of_the_cache(engine: Engine) -> None:
    generator = Generator.on(engine, context_length=32)
    generator.prefill([1, 5, 77])
    view = generator.cache.view()
    contract = generator.cache.contract
    assert (view.layers, view.tokens) == (contract.layers, 3)
    for layer in range(view.layers):
        for array, part in ((view.keys(layer), "key"), (view.values(layer), "value")):
            assert array.shape == (contract.heads, 3, contract.head_dim)
            assert np.shares_memory(array, generator.cache.buffers[layer, part].array)
            assert np.abs(array).max() > 0
            with pytest.raises(ValueError, match="read-only"):
                array[0, 0, 0] = 0
    generator.decode_step(9, precision=2)
    assert view.keys(0).shape[1] == 3  # what there was when it was taken


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "capacity"),
    [(10_000, 64, 128, 4096), (10_000, 64, 128, 10**6), (1, 64, 128, 2**50), (1, 64, 128, 2**62)],
)
def test_a_cache_beyond_memory_is_refused_at_once(layers: int, heads: int, head_dim: int, capacity: int) -> None:
    contract = KvContract(layers=layers, heads=heads, head_dim=head_dim, dtype="float16")
    with pytest.raises(PmpdError, match=f"no memory for a KV cache of {capacity} positions"):
        KvCache(contract, capacity)


@pytest.mark.parametrize(
    ("threads", "message"),
    [
        (0, "threads must be 1 or more, got 0"),
        (-3, "threads must be 1 or more, got -3"),
        (1025, "threads must be at most 1024, got 1025: this process may use"),
        (10**12, "threads must be at most 1024, got 1000000000000"),
    ],
)
def test_numbers_of_threads(engine: Engine, threads: int, message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        Generator(engine.bundle, threads=threads)


def group(root: Path, cgroup: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name.replace("-", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu-max": "150000 100000\n"}, 1.5),  # a container: its group is the root that it sees
        ("0::/\n", {"cpu-max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a__b__cpu-max": "max 100000\n", "a__cpu-max": "200000 100000\n"}, 2.0),  # a group above limits
        ("0::/a\n", {"a__cpu-max": "400000 100000\n", "cpu-max": "100000 100000\n"}, 1.0),
        ("4:cpu,cpuacct:/d\n", {"cpu__cpu-cfs_quota_us": "50000\n", "cpu__cpu-cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu:/\n", {"cpu__cpu-cfs_quota_us": "-1\n", "cpu__cpu-cfs_period_us": "100000\n"}, None),
        ("7:memory:/\n0::/\n", {}, None),
        ("nonsense", {"cpu-max": "zero of it\n"}, None),
    ],
)
def test_quota_of_the_control_group(cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cgroup_quota(group(tmp_path, cgroup, **files)) == quota


@pytest.mark.parametrize(("quota", "threads"), [(None, None), (0.3, 1), (1.0, 1), (10_000.0, None)])
def test_threads_follow_the_quota(quota: float | None, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = len(__import__("os").sched_getaffinity(0))
    monkeypatch.setattr("pmpd.runtime.engine.threads.cgroup_quota", lambda: quota)
    assert available_threads() == (unlimited if threads is None else threads)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeException("bad allocation"), PmpdError, "not enough memory"),
        (MemoryError(), PmpdError, "not enough memory"),
        (Fail("Non-zero status code returned while running BitplaneMatMul\nnode"), PmpdError, "without kernels"),
    ],
)
def test_a_failure_while_running_does_not_blame_the_bundle(
    engine: Engine, error: Exception, kind: type[PmpdError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator.on(engine, context_length=16)
    generator.prefill([1, 5])

    class Broken:
        def run_with_iobinding(self, binding: Any) -> None:
            raise error

    runner = generator.sequence._decode[3]
    monkeypatch.setattr(runner, "loaded", type(runner.loaded)(runner.loaded.graph, runner.loaded.path, Broken(), ""))
    with pytest.raises(kind, match=rf"decode-3\.onnx failed while running .*{message}") as caught:
        generator.decode_step(5, precision=3)
    assert not isinstance(caught.value, BundleError)
    assert "\n" not in str(caught.value)
    assert "export again" not in str(caught.value)
    assert generator.tokens == [1, 5]
