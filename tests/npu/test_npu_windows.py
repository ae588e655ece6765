"""Sliding windows: a layer reads and multiplies the keys and values of its window, not of the whole text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TINY_MODELS

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.npu_backend import Hardware, Model, lower, read_hardware
from pmpd.npu_backend.machine.instructions import Load, Matrix, Operator, Special, Store
from pmpd.npu_backend.machine.simulate import OperatorTime, simulate
from pmpd.npu_backend.program.graph import OnnxGraph

# One multiplier, so that a product takes a cycle per operation, and a program for every length.
ONE = read_hardware("npu-4k").varied(
    matrix_unit__rows=1,
    matrix_unit__mm_outputs=1,
    matrix_unit__mv_outputs=1,
    matrix_unit__inputs=1,
    controller__length_granularity=1,
)


def _model(name: str, folder: Path) -> Model:
    (folder / "config.json").write_text(json.dumps(TINY_MODELS[name].config()))
    export_skeleton(ExportConfig(model=str(folder), output=folder / "skeleton", precisions=(4, 2)))
    return Model.open(folder / "skeleton")


def _attention(graph: OnnxGraph, hardware: Hardware, tokens: int, past: int, *, fp16: bool = False) -> list[Operator]:
    operators = lower(graph, hardware, tokens=tokens, past=past, fp16=fp16).operators
    return [operator for operator in operators if operator.kind == "GroupQueryAttention"]


def _cache(operator: Operator, kind: type) -> Any:
    return sum(step.nbytes for step in operator.instructions if type(step) is kind and step.data == "kv_cache")


def test_decode_costs_no_more_behind_the_window(tmp_path: Path) -> None:
    """Layer 0 has a window of 16 tokens, layer 1 sees all."""
    graph = _model("qwen3-window", tmp_path).decode[2]
    hardware = read_hardware("npu-4k").varied(matrix_unit__mm_outputs=1, matrix_unit__mv_outputs=1)
    run = simulate(lower(graph, hardware, tokens=1, past=np.array([0, 16, 32, 48])), hardware)
    windowed, full = (time for time in run.operators if time.operator.kind == "GroupQueryAttention")

    def costs(time: OperatorTime) -> list[list[float]]:
        needs = (time.cost.memory, time.cost.matrix, time.cost.special)
        values = (time.operator.nbytes("kv_cache"), time.operator.macs, time.joules, *needs)
        return [np.diff(np.broadcast_to(value, 4)).tolist() for value in values]

    for first, second, third in costs(windowed):
        assert first > 0 == second == third
    for increases in costs(full):
        assert min(increases) > 0


@pytest.mark.parametrize(
    ("tokens", "past", "read", "seen"),
    [
        # Decode, a window of 7: up to 6 positions from the cache, and the token's own.
        (1, 0, 0, 1),
        (1, 4, 4, 5),
        (1, 6, 6, 7),
        (1, 7, 6, 7),
        (1, 40, 6, 7),
        # Prompts: token t of 10 sees t of them up to the seventh: 1 + 2 + ... + 7 + 3 * 7 = 49.
        (10, 0, 0, 49),
        # After 4: 5 + 6 + 7 + 7 * 7 = 67; after 20: 10 * 7.
        (10, 4, 4, 67),
        (10, 20, 6, 70),
    ],
)
def test_figures_by_hand(tokens: int, past: int, read: int, seen: int, tmp_path: Path) -> None:
    """Two layers, both with the window; three heads of 16 elements that share a head of keys and one of values."""
    model = _model("mistral-window", tmp_path)
    layers = _attention(model.decode[2] if tokens == 1 else model.prefill, ONE, tokens, past)
    assert len(layers) == 2
    for layer in layers:
        assert _cache(layer, Load) == read * 2 * 16
        assert _cache(layer, Store) == tokens * 2 * 16
        assert layer.macs == seen * 3 * 16 * 2
        (scores,) = (step for step in layer.instructions if isinstance(step, Special) and step.function == "softmax")
        assert scores.elements == seen * 3
        products = [step for step in layer.instructions if isinstance(step, Matrix)]
        assert {step.rows for step in products} == {tokens * 3}
        assert [step.outputs for step in products] == [seen / tokens, 16]


def test_cycles_by_hand(tmp_path: Path) -> None:
    """After 40 tokens: 3 heads, 7 positions and 16 elements twice, at 1 GHz; 3 * 7 scores at 32 a cycle."""
    program = lower(_model("mistral-window", tmp_path).decode[2], ONE, tokens=1, past=40)
    times = [time for time in simulate(program, ONE).operators if time.operator.kind == "GroupQueryAttention"]
    for time in times:
        assert time.cost.matrix == pytest.approx(672e-9)
        rotated = 4 * 16 / 64  # three heads of queries and one of keys, 64 elements a cycle
        assert time.cost.special == pytest.approx((rotated + 21 / 32) * 1e-9)


@pytest.mark.parametrize(
    ("activation_kib", "past", "windowed", "full"),
    [
        # In float16, keys and values of a window take 2 * 16 * 32 * 2 = 2 KiB, and those of 40 tokens 5 KiB, as do a
        # head's queries and outputs. In 2 KiB the window fits; the other layer's queries pass in 3 parts, which read
        # 0 + 40 / 3 + 80 / 3 positions.
        (2, 0, 0, 40),
        # In 1 KiB both pass in 5 parts of 8 tokens. Within a window are 0 + 8 + 15 + 15 + 15 positions before the part.
        (1, 0, 53, 80),
        # After 4 tokens: 4 + 12 + 15 + 15 + 15, and 5 * 4 more than before.
        (1, 4, 61, 100),
        (1, 20, 75, 180),
        (2, 20, 15, 100),
    ],
)
def test_a_window_takes_its_room_on_chip(
    activation_kib: int, past: int, windowed: float, full: float, tmp_path: Path
) -> None:
    """Layer 0 sees all, layer 1 has a window of 16 tokens; three heads of keys, 20 elements in 32 slots."""
    graph = _model("gemma2-uncapped", tmp_path).prefill
    hardware = ONE.varied(buffers__activation_kib=activation_kib)
    layers = _attention(graph, hardware, 40, past, fp16=True)
    assert [_cache(layer, Load) / (2 * 3 * 32 * 2) for layer in layers] == pytest.approx([full, windowed])


@pytest.mark.parametrize("name", ["mistral-window", "gemma2-uncapped"])
def test_a_window_as_long_as_the_text_changes_nothing(name: str, tmp_path: Path) -> None:
    graph = _model(name, tmp_path).prefill

    def changed(window: int | None) -> OnnxGraph:
        nodes = []
        for node in graph.nodes:
            attributes = {key: value for key, value in node.attributes.items() if key != "window"}
            if node.op == "pmpd::GroupQueryAttention" and window is not None:
                attributes["window"] = window
            nodes.append(replace(node, attributes=attributes))
        return replace(graph, nodes=tuple(nodes))

    for tokens, past in (1, 33), (30, 5), (40, 0):
        for hardware in ONE, ONE.varied(buffers__activation_kib=1):
            plain, none, wide, narrow = (
                lower(changed(window), hardware, tokens=tokens, past=past, fp16=True)
                for window in (None, 0, past + tokens, past + tokens - 1)
            )
            assert plain == none == wide != narrow


def test_the_softcap_of_scores_is_a_function_of_each(tmp_path: Path) -> None:
    """Three heads after 40 tokens: in a layer with a window of 7 they have 21 scores, else 123."""
    graph = _model("gemma2", tmp_path).decode[2]
    layers = _attention(graph, ONE, 1, 40)
    tanhs = [
        [step.elements for step in layer.instructions if isinstance(step, Special) and step.function == "activation"]
        for layer in layers
    ]
    assert tanhs == [[21], [123]]
