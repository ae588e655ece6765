"""Make golden files anew: `python tests/golden/make.py texts`, `… bundle` or `… bertscore`; README.md says when."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from tiny_encoders import TINY_ENCODERS  # noqa: E402
from tiny_models import TINY_MODELS, random_ids  # noqa: E402

from pmpd.exporter import ExportConfig, export_bundle  # noqa: E402
from pmpd.exporter.demo import demo_model_path  # noqa: E402
from pmpd.runtime import Bundle, Generator, Tokenizer  # noqa: E402

TEXTS = FOLDER / "demo-texts.json"
BUNDLE = FOLDER / "v4-llama"
PROMPT = "Once upon a time, there was a little girl named Lily."
SCHEDULES = ("uniform:4", "uniform:3", "uniform:2", "static:3@8,2@16")
BERTSCORE = FOLDER / "bertscore.json"
PAIRS = (
    ("The meeting was on Friday.", "On Friday is the meeting!"),
    ("the cat slept", "a dog sat on the mat"),
    ("A dog.", "a cat"),
    ("mats", "mat"),
    ("was, is", "is"),
    ("  the cat \n sat\ton the mat ", "The cat, the dog: a meeting"),
    ("Zoë's café", "zoe's cafe"),
    ("猫", "the cat"),
    ("the dog sat on a mat, " * 5, "a meeting is a meeting " * 7),
    ("", "the cat"),
)
MIXED = ("uniform:3.25", "static:3.25@8,3@16")


def make_texts() -> None:
    """Write what the demo model says at each precision, and unquantized in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    answer = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=40, do_sample=False)[0]
    texts = {"unquantized": tokenizer.decode(answer, skip_special_tokens=True).removeprefix(PROMPT)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo-pmpd"
        export_bundle(ExportConfig(model="demo", output=output, precisions=(4, 3, 2), targets=()))
        bundle = Bundle.open(output)
        generator = Generator(bundle, tokenizer=Tokenizer.from_bundle(bundle))
        ids = Tokenizer.from_bundle(bundle).encode(PROMPT)
        for schedule in SCHEDULES:
            tokens = generator.stream(ids, max_new_tokens=40, schedule=schedule)
            texts[schedule] = "".join(token.text or "" for token in tokens)
    write(TEXTS, {"prompt": PROMPT, "texts": texts})


def make_bundle() -> None:
    """Write a bundle of a tiny random Llama with tied embeddings and a mix, and the tokens that it gives."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the bundle states the checkpoint as `llama-tiny`
        TINY_MODELS["llama-tied-bfloat16"].save(Path("llama-tiny"))
        options = {"calibration": "own", "calibration_samples": 4, "calibration_length": 16}
        config = ExportConfig(model="llama-tiny", output=BUNDLE, precisions=(4, 3.25, 3, 2), targets=(), **options)
        export_bundle(config)
    generator = Generator(Bundle.open(BUNDLE), kernels=False)
    prompt = random_ids(131, 9)
    tokens = {
        schedule: [token.id for token in generator.stream(prompt, max_new_tokens=32, schedule=schedule)]
        for schedule in (*SCHEDULES, *MIXED)
    }
    generator.reset()
    logits = [round(float(logit), 4) for logit in generator.prefill(prompt)]
    write(BUNDLE.with_suffix(".tokens.json"), {"prompt": prompt, "tokens": tokens, "logits_of_prompt": logits})


def make_bertscore() -> None:
    """Write what the package bert-score says of the tiny encoders; needs bert-score 0.3.13 and transformers 4."""
    import bert_score

    outputs, references = map(list, zip(*PAIRS, strict=True))
    scores: dict[str, dict[int, list[list[float]]]] = {}
    for name, save in TINY_ENCODERS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            save(path)
            for layer in (2, 3):
                # One pair a batch, as the package also matches tokens with the padding.
                options = {"model_type": str(path), "num_layers": layer, "batch_size": 1, "device": "cpu"}
                columns = bert_score.score(outputs, references, **options)
                rows = zip(*(column.tolist() for column in columns), strict=True)
                scores.setdefault(name, {})[layer] = [[round(value, 6) for value in row] for row in rows]
    write(BERTSCORE, {"pairs": PAIRS, "scores": scores})


def write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    {"texts": make_texts, "bundle": make_bundle, "bertscore": make_bertscore}[sys.argv[1]]()
