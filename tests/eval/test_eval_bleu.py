"""BLEU and ROUGE against the command lines of sacrebleu and rouge-score, on the same texts in files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.eval.metrics.bleu import SMOOTHINGS, Smoothing, bleu_of, bleu_statistics, signature
from pmpd.eval.metrics.rouge import ROUGE, rouge
from pmpd.runtime import MissingExtraError

OUTPUTS = (
    "The meeting was moved to Friday because Tom is ill.",
    'Anna asks Ben for the "blue" book, which he has lost; he\'ll buy her a new one for $12.50.',
    "He likes it.",
    "",
    "yes",
    "nothing here agrees, at all, with anything",
    "El niño comió 3,5 kg de piñas & queso <b>viejo</b> — ¡qué bien!",
)
REFERENCES = (
    "Because Tom is ill, the meeting was moved to Friday.",
    "Ben has lost the blue book that Anna asks for, and he'll buy her a new one for $12.50.",
    "He likes it.",
    "Nobody says a word.",
    "Yes, yes.",
    "They talk about holidays.",
    "El niño comió piñas y 3,5 kg de queso <b>viejo</b>: ¡qué bien!",
)
OTHER_REFERENCES = (
    "Tom is ill, so they meet on Friday.",
    'Anna wants the "blue" book, which Ben has lost.',
    "He likes it very much.",
    "",
    "yes",
    "The holidays are over.",
    "¡Qué bien! El niño comió.",
)
Corpus = tuple[Sequence[str], Sequence[Sequence[str]]]  # outputs, and for each of them its references
CORPORA: dict[str, Corpus] = {
    "one reference": (OUTPUTS, [[text] for text in REFERENCES]),
    "two references": (OUTPUTS, list(zip(REFERENCES, OTHER_REFERENCES, strict=True))),
    "one segment": (OUTPUTS[:1], [REFERENCES[:1]]),
    "empty": ([""], [["Nobody says a word."]]),
    "one word": (["yes"], [["yes"]]),
    "three words": (OUTPUTS[2:3], [REFERENCES[2:3]]),
    "no match": (OUTPUTS[5:6], [REFERENCES[5:6]]),
    "no match of four words": (["a b c d e"], [["a b c x d e"]]),
    "no match of two words": (["a x b y c z"], [["a b c d e f g h"]]),
    "short": (["the meeting was moved"], [["the meeting was moved to Friday, he said"]]),
}


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def sums_of(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts ``[10]`` of a corpus."""
    rows = [bleu_statistics(output, texts) for output, texts in zip(outputs, references, strict=True)]
    total: np.ndarray = np.sum(rows, axis=0)
    return total


@pytest.mark.parametrize("smoothing", SMOOTHINGS.values())
@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_bleu_is_what_the_command_line_of_sacrebleu_says(tmp_path: Path, smoothing: Smoothing, corpus: Corpus) -> None:
    outputs, references = corpus
    files = [
        write_lines(tmp_path / f"reference-{number}.txt", texts)
        for number, texts in enumerate(zip(*references, strict=True))
    ]
    command = [sys.executable, "-m", "sacrebleu", *files, "-i", write_lines(tmp_path / "output.txt", outputs)]
    process = subprocess.run(
        [*map(str, command), "--smooth-method", smoothing, "--width", "12"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    result = json.loads(process.stdout)
    score = bleu_of(sums_of(outputs, references), smoothing)
    assert score == pytest.approx(result["score"], rel=1e-10, abs=1e-10)
    assert signature(smoothing, [len(references[0])]) == result["signature"]


def test_scores_of_the_corpora_differ() -> None:
    scores = {name: float(bleu_of(sums_of(*corpus), "exp")) for name, corpus in CORPORA.items()}
    assert scores["one reference"] > 10
    assert scores["two references"] > scores["one reference"]
    assert scores["no match of four words"] > 0 == bleu_of(sums_of(*CORPORA["no match of four words"]), "none")
    assert scores["empty"] == scores["no match"] == scores["one word"] == 0


def test_segments_with_different_numbers_of_references_have_the_signature_of_sacrebleu() -> None:
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(smooth_method="none")
    metric.corpus_score(["a b", "c", "d"], [["a b", "c", "d"], ["a", None, "d"]])
    assert signature("none", [2, 1, 2]) == str(metric.get_signature())
    assert "nrefs:var" in signature("none", [2, 1, 2])


texts = st.lists(st.sampled_from(("a", "b", "c", "d.")), max_size=9).map(" ".join)


@given(st.lists(st.tuples(texts, texts, st.none() | texts), min_size=1, max_size=4), st.sampled_from(("exp", "none")))
@settings(max_examples=200, deadline=None)
def test_bleu_is_the_corpus_score_of_sacrebleu(corpus: list[tuple[str, str, str | None]], smoothing: Smoothing) -> None:
    from sacrebleu.metrics.bleu import BLEU

    outputs, firsts, seconds = zip(*corpus, strict=True)
    references = [[first] if second is None else [first, second] for first, second in zip(firsts, seconds, strict=True)]
    expected = BLEU(smooth_method=smoothing).corpus_score(outputs, [firsts, seconds]).score
    score = bleu_of(sums_of(outputs, references), smoothing)
    assert score == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("smoothing", ["exp", "none"])
def test_many_resamples_are_scored_at_once(smoothing: Smoothing) -> None:
    rows = np.array([bleu_statistics(output, [text]) for output, text in zip(OUTPUTS, REFERENCES, strict=True)])
    resamples = np.random.default_rng(0).integers(0, len(rows), (3, 50, len(rows)))
    sums = rows[resamples].sum(axis=2)  # [3, 50, 10]
    scores = bleu_of(sums, smoothing)
    assert scores.shape == (3, 50)
    assert scores.tolist() == [[bleu_of(sample, smoothing) for sample in block] for block in sums]
    assert len(np.unique(scores)) > 100


@pytest.mark.parametrize("call", [lambda: bleu_statistics("a", ["a"]), lambda: signature("exp", [1])])
def test_without_sacrebleu_it_says_what_to_install(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    from pmpd.eval.metrics import bleu

    bleu._metric.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingExtraError, match=r"sacrebleu is not installed: run `pip install 'pmpd\[eval\]'`"):
        call()


def test_rouge_is_what_the_command_line_of_rouge_score_says(tmp_path: Path) -> None:
    targets = write_lines(tmp_path / "targets.txt", REFERENCES)
    predictions = write_lines(tmp_path / "predictions.txt", OUTPUTS)
    scores = tmp_path / "scores.csv"
    subprocess.run(
        [
            *(sys.executable, "-m", "rouge_score.rouge", "--use_stemmer", "--noaggregate"),
            *(f"--target_filepattern={targets}", f"--prediction_filepattern={predictions}"),
            f"--output_filename={scores}",
        ],
        capture_output=True,
        timeout=60,
        check=True,
    )
    with scores.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(OUTPUTS)
    for row, output, reference in zip(rows, OUTPUTS, REFERENCES, strict=True):
        expected = {name: 100 * float(row[f"{name}-F"]) for name in ROUGE}  # of six decimals
        assert rouge(output, [reference]) == pytest.approx(expected, abs=1e-4)
