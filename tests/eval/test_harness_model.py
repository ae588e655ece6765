"""lm-evaluation-harness on bundles, with the harness itself: it is in no extra of `dev`, so .ci/run installs it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'pmpd[harness]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from pmpd.eval.harness.model import PmpdLM
from pmpd.eval.harness.paired import compare_runs
from pmpd.eval.metrics.logits import log_softmax
from pmpd.exporter import ExportConfig, export_bundle
from pmpd.exporter.demo import demo_model_path
from pmpd.runtime import AdaptivePlan, Bundle, Generator, PmpdError, Tokenizer, parse_schedule

STORY = "Once upon a time, there was a little girl named Lily. She had a big red ball and she loved to play with it."
PAIRS = [
    (STORY, " One day, the ball was gone."),
    (STORY, " The end."),
    (STORY, " x"),
    (f"{STORY} One day", ", she was sad."),
    ("Tom had a dog. ", "The dog was big."),
    ("", "Once upon a time"),
]


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def likelihoods(model: PmpdLM, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def answers(model: PmpdLM, prompts: Sequence[str], **arguments: Any) -> list[str]:
    requests = instances("generate_until", [(prompt, arguments) for prompt in prompts])
    return model.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> PmpdLM:
    return PmpdLM(str(demo_bundle), schedule="static:3@2+2@4", max_length=128)


def stepwise(bundle: Path, spec: str, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    """Score an answer one decode step at a time, as the runtime's loop decodes."""
    opened = Bundle.open(bundle)
    schedule = parse_schedule(spec, opened.manifest.precisions)
    generator = Generator(opened, context_length=128)
    logits = generator.prefill(prompt, precision=schedule.prefill)
    plan = generator.begin(schedule, logits)
    rows = [logits]
    for step, token in enumerate(answer[:-1]):
        rows.append(generator.decode_step(token, precision=plan.precision(step)))
        repeat_at = plan.observe(step, rows[-1]) if isinstance(plan, AdaptivePlan) else None
        if repeat_at is not None:
            generator.sequence.truncate(len(generator.tokens) - 1)
            rows[-1] = generator.decode_step(token, precision=repeat_at)
    table = log_softmax(np.array(rows))
    return float(table[np.arange(len(answer)), answer].sum()), table.argmax(axis=1).tolist() == answer


@pytest.mark.parametrize("spec", ["static:3@2,2@4", "2", "prefill:2,uniform:3", "adaptive:2,4@1", "repeat:2,4@1"])
def test_log_likelihoods_are_those_of_decode_steps(demo_bundle: Path, spec: str) -> None:
    model = PmpdLM(str(demo_bundle), schedule=spec.replace(",", "+"), max_length=128)
    tokenizer = Tokenizer.from_bundle(Bundle.open(demo_bundle))
    for (context, continuation), (score, greedy) in zip(PAIRS[:4], likelihoods(model, PAIRS[:4]), strict=True):
        prompt = tokenizer.encode(context)
        answer = tokenizer.encode(context + continuation)[len(prompt) :]
        expected, best = stepwise(demo_bundle, spec, prompt, answer)
        assert score == pytest.approx(expected, abs=0.02)
        assert greedy == best


def test_a_greedy_answer_is_greedy(model: PmpdLM) -> None:
    (text,) = answers(model, [STORY], max_gen_toks=6)
    ((_, greedy), (_, other)) = likelihoods(model, [(STORY, text), (STORY, f"{text} zebra")])
    assert greedy
    assert not other


def test_results_do_not_depend_on_other_requests(demo_bundle: Path, model: PmpdLM) -> None:
    together = likelihoods(model, PAIRS)
    answers(model, [STORY[:60]], max_gen_toks=5)
    again = likelihoods(model, PAIRS[::-1])[::-1]
    fresh = [likelihoods(PmpdLM(str(demo_bundle), "static:3@2+2@4", max_length=128), [pair])[0] for pair in PAIRS]
    for scores in (again, fresh):
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in together], abs=1e-3)


def test_a_shared_context_is_read_once(model: PmpdLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = Generator.prefill

    def counted(generator: Generator, ids: Sequence[int], **options: Any) -> Any:
        read.append(len(ids))
        return prefill(generator, ids, **options)

    likelihoods(model, [("Something else.", " x")])  # what the cache holds now is of no use
    monkeypatch.setattr(Generator, "prefill", counted)
    likelihoods(model, PAIRS[:4])
    context, longer = (len(model.tok_encode(text)) for text in (STORY, PAIRS[3][0]))
    assert len(read) == 2
    assert context - 1 <= read[0] <= context  # the start of a text is in the cache already
    assert read[1] == longer - context + (2 if longer - context < 2 else 0)


def test_rolling_log_likelihood_predicts_each_token_once(model: PmpdLM, demo_bundle: Path) -> None:
    text = " ".join([STORY] * 6)
    (total,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    ids = [*model.tok_encode(text)]
    first, second = ids[:128], ids[128:]
    assert 0 < len(second) < 128
    expected = stepwise(demo_bundle, "static:3@2,2@4", [model.prefix_token_id], first)[0]
    kept = ids[len(ids) - 129 : 128]
    expected += stepwise(demo_bundle, "static:3@2,2@4", kept, second)[0]
    assert total == pytest.approx(expected, abs=0.05)
    assert model.loglikelihood_rolling(instances("loglikelihood_rolling", [("",)]), disable_tqdm=True) != [total]


def test_generation_is_the_runtimes(model: PmpdLM, demo_bundle: Path) -> None:
    opened = Bundle.open(demo_bundle)
    generator = Generator(opened, tokenizer=Tokenizer.from_bundle(opened))
    prompts = [STORY, f"{STORY} One day", "Tom had a dog."]
    expected = [
        generator.generate(prompt, max_new_tokens=12, schedule="static:3@2,2@4", stop_strings=["."]).text
        for prompt in prompts
    ]
    assert answers(model, prompts, until=["."], max_gen_toks=12) == expected
    assert answers(model, prompts[::-1], until=["."], max_gen_toks=12) == expected[::-1]
    assert not any("." in text for text in expected)


def test_long_contexts_lose_their_beginning(demo_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = PmpdLM(str(demo_bundle), schedule="4", max_length=16)
    ids = model.tok_encode(STORY)
    tail = ids[-12:]
    with caplog.at_level(logging.WARNING, "pmpd.eval"):
        ((score, _),) = model._loglikelihood_tokens([(None, ids, ids[:5])], disable_tqdm=True)
        (text,) = answers(model, [STORY], max_gen_toks=4)
    assert score == pytest.approx(stepwise(demo_bundle, "4", tail, ids[:5])[0], abs=0.02)
    generator = Generator(Bundle.open(demo_bundle))
    tokens = [token.id for token in generator.stream(tail, max_new_tokens=4, schedule="4")]
    assert model.tokenizer.decode(tokens).strip() == text.strip()
    warnings = [record.getMessage() for record in caplog.records if record.name == "pmpd.eval"]
    assert len(warnings) == 2
    assert warnings[0].startswith("1 of 1 contexts lost their beginnings: context and answer do not fit the 16 tokens")
    assert model.get_model_info()["shortened_contexts"] == 2


def test_model_info_has_the_bits_that_were_read(demo_bundle: Path) -> None:
    model = PmpdLM(str(demo_bundle), schedule="prefill:3+static:4@0+2@2", max_length=64)
    assert model.get_model_info()["average_bits"] is None
    model._loglikelihood_tokens([(None, [1, 5, 9], [7, 8, 9, 10, 11])], disable_tqdm=True)
    answers(model, ["Tom"], max_gen_toks=3)
    info = model.get_model_info()
    assert (info["schedule"], info["prefill_bits"]) == ("prefill:3,static:4@0,2@2", 3)
    assert (info["decode_steps"], info["average_bits"]) == (6, (4 + 4 + 2 + 2 + 4 + 4) / 6)


def test_chat_templates(model: PmpdLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(PmpdError, match="no chat template"):
        model.apply_chat_template(chat)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with_template = Tokenizer(model.tokenizer._tokenizer, template, {"bos_token": "<s>"})
    monkeypatch.setattr(model, "tokenizer", with_template)
    text = model.apply_chat_template([{"role": "system", "content": "Be brief"}, *chat])
    assert text == "<s>[user] Hi\n[assistant]"
    opened = [*chat, {"role": "assistant", "content": "He"}]
    assert model.apply_chat_template(opened, add_generation_prompt=False) == "<s>[user] Hi\n[assistant] He"
    assert model.chat_template(True) == template
    start = model.prefix_token_id
    assert model.tok_encode(text)[:2].count(start) == 1  # the template writes it, so the tokenizer need not
    assert model.tok_encode("Hi")[0] == start
    assert model.tok_encode("Hi", add_special_tokens=False)[0] != start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a bundle: --model_args bundle=DIR"),
        ({"bundle": "nowhere"}, "nowhere"),
        ({"shedule": "4"}, "unknown model argument 'shedule': choose one of schedule"),
        ({"schedule": "uniform:9"}, "unknown precision '9'"),
        ({"schedule": "sometimes"}, "unknown schedule 'sometimes'"),
        ({"batch_size": "auto"}, "batch size auto: a bundle reads one text at a time"),
        ({"batch_size": 8}, "batch size 8"),
        ({"threads": "all"}, "threads must be a whole number of 1 or more, got 'all'"),
        ({"max_length": 4096}, "context length 4096: the model allows 1 to 1024"),
        ({"accuracy": "best"}, "accuracy"),
    ],
)
def test_arguments_that_do_not_fit(demo_bundle: Path, arguments: dict[str, Any], message: str) -> None:
    bundle = {"bundle": str(demo_bundle)} if arguments else {}
    with pytest.raises(PmpdError, match=message):
        get_model("pmpd")(**(bundle | arguments))


def test_requests_that_do_not_fit(model: PmpdLM) -> None:
    with pytest.raises(PmpdError, match=r"the continuation '' has 0 tokens: it must have 1 to 128"):
        likelihoods(model, [("Tom", "")])
    with pytest.raises(PmpdError, match="128 new tokens leave no room for a prompt in 128"):
        answers(model, ["Tom"], max_gen_toks=128)
    with pytest.raises(PmpdError, match="asks for sampling"):
        answers(model, ["Tom"], do_sample=True)


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """The demo model at 8 bits beside the harness's own model `hf`: the same tokens, windows and truncation."""
    pytest.importorskip("accelerate", reason="the harness's model hf needs accelerate")
    config = ExportConfig(
        model="demo", output=tmp_path / "bundle", precisions=(8,), calibration="none", targets=(), verify=False
    )
    export_bundle(config)
    ours = PmpdLM(str(tmp_path / "bundle"), max_length=48)
    theirs = get_model("hf")(pretrained=str(demo_model_path()), dtype="float32", device="cpu", max_length=48)
    pairs = [*PAIRS, (" ".join([STORY] * 3), " One day, the ball was gone.")]
    for pair, (mine, greedy), (reference, best) in zip(
        pairs, likelihoods(ours, pairs), theirs.loglikelihood(instances("loglikelihood", pairs)), strict=True
    ):
        assert mine == pytest.approx(reference, rel=0.02, abs=0.05), pair
        assert greedy == best
    texts = [(" ".join([STORY] * 3),), (STORY[:40],)]
    rolling = [m.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for m in (ours, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], rel=0.02)
    requests = instances(
        "generate_until", [("Once upon a time, there was a little", {"until": ["."], "max_gen_toks": 8})]
    )
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def run(*arguments: str | Path, home: Path, module: str = "cli") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    code = f"from pmpd.eval.harness.{module} import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def stories(folder: Path) -> Path:
    names = ("Lily", "Tom", "Anna", "Ben", "Max")
    texts = [
        f"Once there was {name}. {name} had a dog. The dog was big. One day, they ran. {name} was happy. The end."
        for name in names
    ]
    path = folder / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_tasks_of_the_harness_on_local_files(demo_bundle: Path, tmp_path: Path) -> None:
    tasks, home = tmp_path / "tasks", tmp_path / "home"
    process = run(tasks, "--stories", stories(tmp_path), "--limit", "4", home=home, module="offline")
    assert process.returncode == 0, process.stderr
    words, cloze = process.stdout.split()
    assert Path(words).name == "lambada_openai_local.yaml"
    folders = []
    for name, schedule in (("high", "4"), ("low", "prefill:2+2")):
        folders.append(tmp_path / name)
        process = run(
            *("--model", "pmpd", "--model_args", f"bundle={demo_bundle},schedule={schedule},threads=1"),
            *("--tasks", cloze, "--log_samples", "--output_path", folders[-1]),
            home=home,
        )
        assert process.returncode == 0, process.stderr
        assert "|storycloze_2016_local|" in process.stdout
        (results,) = folders[-1].rglob("results_*.json")
        document = json.loads(results.read_text(encoding="utf-8"))
        assert document["config"]["average_bits"] == (4 if name == "high" else 2)
        (score,) = (value for key, value in document["results"]["storycloze_2016_local"].items() if key == "acc,none")
        (comparison,) = compare_runs(folders[-1], folders[-1])
        assert comparison.first.value == score
        assert comparison.difference.value == 0
    assert compare_runs(*folders)[0].difference.count == 4


def test_perplexity_over_documents_is_the_harnesss(model: PmpdLM, tmp_path: Path) -> None:
    text = "\n \n = A = \n \n Tom had a dog . \n \n = B = \n \n Lily had a big red ball . \n"
    (tmp_path / "wiki.raw").write_text(text, encoding="utf-8")
    process = run(tmp_path / "tasks", "--wikitext", tmp_path / "wiki.raw", home=tmp_path / "home", module="offline")
    pages = [json.loads(line) for line in (tmp_path / "tasks" / "wikitext_local.jsonl").read_text().splitlines()]
    assert [page["page"].split()[1] for page in pages] == ["A", "B"]
    results = simple_evaluate(model, tasks=[process.stdout.strip()], bootstrap_iters=0)
    assert results["results"]["wikitext_local"]["word_perplexity,none"] > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model_args", "bundle={bundle},schedule=uniform:7"], 1, "error: schedule 'uniform:7': unknown precision"),
        (["--no-such-option"], 2, "unrecognized arguments: --no-such-option"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    demo_bundle: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    words = [word.format(bundle=demo_bundle) for word in arguments]
    process = run("--model", "pmpd", "--tasks", "wikitext", *words, home=tmp_path)
    assert process.returncode == code
    assert message in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
