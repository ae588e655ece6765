"""The network of a learned schedule: what it can learn, its ONNX file, and the schedule that it makes in a bundle."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.eval.solve.network import Network, Prompt, to_onnx, train
from pmpd.eval.solve.publish import publish
from pmpd.runtime import Bundle, BundleError, Generator, PmpdError, Schedule, StaticSchedule
from pmpd.runtime.schedule.learned import LearnedSchedule, SchedulerCard, weights_digest
from pmpd.runtime.schedule.registry import parse_schedule, schedule_of

CHOICES = ("2@0", "4@0,2@10", "4@0,2@20", "4@0")


def card(bundle: Bundle) -> SchedulerCard:
    return SchedulerCard(
        choices=CHOICES,
        length=30,
        layer=0,
        prefill=bundle.manifest.prefill_precision,
        confidence=0.5,
        weights=weights_digest(bundle.manifest),
    )


def network(bundle: Bundle, seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Network(bundle.manifest.kv_cache.head_dim, len(CHOICES), 8)
        torch.nn.init.normal_(made.query)
    return made


def to_file(bundle: Bundle, made: Network, made_for: SchedulerCard) -> bytes:
    cache = bundle.manifest.kv_cache
    return to_onnx(made, made_for, heads=cache.heads, dtype=cache.dtype)


def always(bundle: Bundle, choice: int) -> Network:
    """Return a network that makes one choice."""
    made = network(bundle)
    with torch.no_grad():
        made.last.weight.zero_()
        made.last.bias.copy_(torch.eye(len(CHOICES))[choice] * 9)
    return made


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Bundle:
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy, copy_function=os.link)
    return Bundle.open(copy)


def prompts(count: int, *, seed: int, label: str) -> list[Prompt]:
    """Return prompts of two heads and width 8, with labels at random or by the sign of a value."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        keys, values = rng.normal(size=(2, 2, rng.integers(3, 9), 8)).astype(np.float32)
        sign = rng.choice([-1, 1])
        values[..., 0] += 2 * sign
        made.append(Prompt(keys, values, int(rng.integers(2)) if label == "random" else int(sign > 0)))
    return made


def test_it_learns_what_can_be_learned() -> None:
    made, course = train(
        prompts(96, seed=0, label="sign"), prompts(32, seed=1, label="sign"), choices=2, hidden=8, seeds=(0,)
    )
    unseen = prompts(64, seed=2, label="sign")
    assert course.validation < course.prior / 2
    assert sum(made.choose(prompt, 0.5) == prompt.label for prompt in unseen) > 56


def test_it_learns_nothing_from_labels_at_random() -> None:
    _, course = train(
        prompts(96, seed=0, label="random"), prompts(32, seed=1, label="random"), choices=2, hidden=8, seeds=(0,)
    )
    assert abs(course.validation - course.prior) < 0.05


def test_the_same_seeds_give_the_same_network() -> None:
    one, two = (
        train(prompts(24, seed=0, label="sign"), prompts(8, seed=1, label="sign"), choices=2, hidden=4, seeds=(3, 4))[0]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@given(tokens=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_the_file_computes_what_the_network_does(demo_bundle: Path, tokens: int, seed: int) -> None:
    bundle = Bundle.open(demo_bundle)
    cache = bundle.manifest.kv_cache
    made = network(bundle, seed)
    with torch.no_grad():
        made.last.weight.mul_(9)  # decided enough that rounding does not change a choice
    schedule = LearnedSchedule(to_file(bundle, made, card(bundle)), bundle.manifest, file="n.onnx")
    shape = (2, cache.heads, tokens, cache.head_dim)
    keys, values = np.random.default_rng(seed).normal(size=shape).astype(cache.dtype)
    assert schedule.choose(keys, values) == made.choose(Prompt(keys, values, 0), schedule.card.confidence)


def test_more_confidence_takes_more_bits(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    cache = bundle.manifest.kv_cache
    nothing = np.zeros((cache.heads, 3, cache.head_dim), cache.dtype)
    made = network(bundle)
    with torch.no_grad():
        made.last.weight.zero_()
        made.last.bias.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
    chosen = []
    for confidence in (0.3, 0.5, 0.8, 0.99):
        file = to_file(bundle, made, replace(card(bundle), confidence=confidence))
        chosen.append(LearnedSchedule(file, bundle.manifest, file="n.onnx").choose(nothing, nothing))
    assert chosen == [0, 1, 2, 3]


def learned(bundle: Bundle, made: Network, *, made_for: SchedulerCard | None = None, name: str = "mine") -> Bundle:
    """Return the bundle with a learned schedule in it."""
    publish(bundle, name, to_file(bundle, made, made_for or card(bundle)), "{}", default=True)
    return Bundle.open(bundle.path, verify=True)


@pytest.mark.full
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_an_answer_is_that_of_the_schedule_that_was_chosen(bundle: Bundle, choice: int) -> None:
    bundle = learned(bundle, always(bundle, choice))
    generator = Generator(bundle, context_length=64, threads=1)
    ours = generator.generate([1, 5, 9], max_new_tokens=30, stop_ids=())
    theirs = generator.generate([1, 5, 9], max_new_tokens=30, stop_ids=(), schedule=f"static:{CHOICES[choice]}")
    assert [(t.id, t.precision) for t in ours.tokens] == [(t.id, t.precision) for t in theirs.tokens]


def test_switch_points_move_with_the_longest_answer(bundle: Bundle) -> None:
    bundle = learned(bundle, network(bundle))
    (file,) = (name for name in bundle.manifest.files if name.endswith(".onnx") and name.startswith("schedules/"))
    assert bundle.manifest.schedule == f"learned:{file}"
    half = schedule_of(bundle, f"learned:{file}@15")
    assert isinstance(half, LearnedSchedule)
    assert half.choices[1] == StaticSchedule(((4, 0), (2, 5)))
    assert half.precisions == (4, 2)
    assert str(half) == f"learned:{file}@15"
    whole: Schedule = schedule_of(bundle)
    assert whole == schedule_of(bundle, "mine") != half
    assert hash(whole) == hash(schedule_of(bundle, "mine"))


def test_a_name_that_is_learned_again_leaves_no_old_file(bundle: Bundle) -> None:
    bundle = learned(learned(bundle, network(bundle, 1)), network(bundle, 2))
    listed = {name for name in bundle.manifest.files if name.startswith("schedules/")}
    assert listed == {f"schedules/{file.name}" for file in (bundle.path / "schedules").iterdir()}
    assert len(listed) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "0"}, "was trained for another model: train one for this bundle"),
        ({"prefill": 3}, "was trained on prompts of 3 bits, and here they have 4"),
        ({"choices": (*CHOICES[:3], "8@0")}, "unknown precision '8': choose one of 4, 3, 2"),
        ({"choices": CHOICES[:3]}, "it gives logits of shape (4,) for 3 choices"),
        ({"choices": (*CHOICES[:3], "2@0,4@9")}, "precisions must fall"),
        ({"layer": 99}, "it reads layer 99 of"),
    ],
)
def test_a_network_for_something_else_is_refused(bundle: Bundle, change: dict[str, object], message: str) -> None:
    made_for = replace(card(bundle), **change)  # type: ignore[arg-type]
    bundle = learned(bundle, network(bundle), made_for=made_for)
    with pytest.raises(PmpdError) as caught:
        schedule_of(bundle)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_networks_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load_from_string(to_file(bundle, network(bundle), card(bundle)))
    del model.metadata_props[:]
    for data in (b"", b"nonsense", model.SerializeToString()):
        publish(bundle, "mine", data, "{}", default=False)
        with pytest.raises(BundleError, match=r"is not the network of a scheduler .*: train it again"):
            schedule_of(Bundle.open(bundle.path), "mine")
    with pytest.raises(BundleError, match=r"has no file 'schedules/x.onnx': make one with pmpd-schedule learn"):
        schedule_of(bundle, "learned:schedules/x.onnx")
    with pytest.raises(BundleError, match="lies outside the bundle"):
        schedule_of(bundle, "learned:../x.onnx")
    with pytest.raises(PmpdError, match="its network is a file of a bundle, and here is none"):
        parse_schedule("learned:schedules/x.onnx", (4, 3))
    with pytest.raises(PmpdError, match="does not fit the form learned:FILE or learned:FILE@TOKENS"):
        schedule_of(bundle, "learned:x@0")


def test_an_unknown_name_lists_those_of_the_bundle(bundle: Bundle) -> None:
    bundle = learned(bundle, network(bundle), name="dialogsum")
    with pytest.raises(PmpdError, match="unknown schedule 'dialogsun': choose one of dialogsum, "):
        schedule_of(bundle, "dialogsun")


def test_networks_of_other_models_do_not_fit(bundle: Bundle) -> None:
    cache = bundle.manifest.kv_cache
    wide = Network(cache.head_dim + 1, len(CHOICES), 4)
    file = to_onnx(wide, card(bundle), heads=cache.heads, dtype=cache.dtype)
    with pytest.raises(BundleError, match=r"n.onnx is damaged, train it again: ONNX Runtime cannot run it \("):
        LearnedSchedule(file, bundle.manifest, file="n.onnx")
