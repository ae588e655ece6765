"""SmolLM2-135M-Instruct, a model that people use: it exports, passes verification, and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmpd.runtime import Bundle, Generator, Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]


@pytest.fixture(scope="module")
def bundle(smollm2_bundle: Path) -> Bundle:
    return Bundle.open(smollm2_bundle, verify=True)


def test_the_export_is_verified(bundle: Bundle) -> None:
    assert bundle.manifest.verified
    assert bundle.manifest.precisions == (4, 3, 2)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "portable"])
def test_it_answers_a_question_at_four_bits(bundle: Bundle, kernels: bool) -> None:
    tokenizer = Tokenizer.from_bundle(bundle)
    generator = Generator(bundle, tokenizer=tokenizer, kernels=kernels, context_length=256)
    prompt = tokenizer.apply_chat_template(QUESTION)
    answer = "".join(token.text or "" for token in generator.stream(prompt, max_new_tokens=24, schedule="uniform:4"))
    assert "Paris" in answer
    assert generator.trace.finish_reason == "stop_id"
