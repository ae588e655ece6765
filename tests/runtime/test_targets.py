"""The one list of targets: which machine loads which, and that each can be compiled for."""

from __future__ import annotations

import platform

import pytest

from pmpd.runtime import PmpdError
from pmpd.runtime.format.targets import MACHINES, check_target, machine_targets
from pmpd.tvm_kernels.targets import TARGETS, host_target


@pytest.mark.parametrize(
    ("system", "machine", "targets"),
    [
        ("Linux", "x86_64", ("x86-64-v4", "x86-64-v3")),
        ("Linux", "aarch64", ("aarch64-linux",)),
        ("Darwin", "arm64", ()),
        ("Windows", "AMD64", ()),
    ],
)
def test_a_machine_loads_its_targets_best_first(
    system: str, machine: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert machine_targets() == targets
    assert host_target() == (targets[0] if targets else None)


def test_every_target_has_compile_flags() -> None:
    assert list(TARGETS) == list(MACHINES)
    assert {name: target.arch for name, target in TARGETS.items()} == {
        name: machine.architecture for name, machine in MACHINES.items()
    }


def test_an_unknown_target_names_the_others() -> None:
    assert check_target("aarch64-linux") == "aarch64-linux"
    with pytest.raises(PmpdError, match="unknown target 'x86-64-v5': choose one of x86-64-v4, x86-64-v3, aarch64"):
        check_target("x86-64-v5")
