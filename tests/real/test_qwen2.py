"""Qwen2.5-Coder-0.5B, whose keys have biases of up to 200, through the exporter's own checks."""

from __future__ import annotations

from pathlib import Path

from pmpd.exporter import ExportConfig, export_bundle
from pmpd.runtime import Bundle, Generator, Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]


def test_it_exports_with_every_check_and_answers(qwen2: Path, tmp_path: Path) -> None:
    export_bundle(
        ExportConfig(
            model=str(qwen2), output=tmp_path / "bundle", context_length=2048, precisions=(4,), calibration="none"
        )
    )
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.verified
    assert bundle.manifest.architecture.family == "qwen2"
    tokenizer = Tokenizer.from_bundle(bundle)
    generator = Generator(bundle, tokenizer=tokenizer)
    prompt = tokenizer.apply_chat_template(QUESTION)
    answer = "".join(token.text or "" for token in generator.stream(prompt, max_new_tokens=24, schedule="uniform:4"))
    assert "Paris" in answer
