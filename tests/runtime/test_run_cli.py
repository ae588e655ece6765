"""`pmpd-run` as a user types it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner, Result

from pmpd.runtime.cli import main
from pmpd.runtime.format.bundle import sha256_of

PROMPT = "Once upon a time, there was a little girl named Lily."
ANSWER = " She loved to play"  # four tokens at 4 bits
COMMAND = [str(Path(sys.executable).with_name("pmpd-run"))]


def run(*arguments: str | Path, given: str | None = None, terminal: bool = False) -> Result:
    """Run the command in this process; an exception that would show a traceback fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=given, color=terminal)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_of(result: Result, *, code: int = 1) -> str:
    """Return the one line of a failed run."""
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_text_on_stdout_and_statistics_on_stderr(demo_bundle: Path) -> None:
    result = run(demo_bundle, "-p", PROMPT, "-n", "4", "--schedule", "static:3@2,2@4")
    assert result.exit_code == 0
    assert result.stdout == f"{PROMPT}{ANSWER}\n"
    statistics = r"prompt 14 tokens at [\d.]+/s, answer 4 tokens at [\d.]+/s, average 3\.67 bits\n"
    assert re.fullmatch(statistics, result.stderr)


@pytest.mark.parametrize("arguments", [[], ["-p", "-"]])
def test_prompt_on_stdin(demo_bundle: Path, arguments: list[str]) -> None:
    result = run(demo_bundle, *arguments, "-n", "4", "--quiet", given=f"{PROMPT}\n")
    assert (result.stdout, result.stderr) == (f"{PROMPT}{ANSWER}\n", "")


def test_show_precision_colours_tokens(demo_bundle: Path) -> None:
    arguments = [str(demo_bundle), "-p", PROMPT, "-n", "4", "--show-precision", "--schedule", "static:4@0,3@1,2@2"]
    result = run(*arguments, terminal=True)
    colours = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m", result.stdout)
    assert "".join(text for _, text in colours) == ANSWER
    first, second, third, fourth = (code for code, _ in colours)
    assert first == second  # prefill and step 0, both 4 bits
    assert len({second, third, fourth}) == 3
    legend = dict(re.findall(r"\x1b\[(\d+)m(\d)-bit\x1b\[0m", result.stderr))
    assert legend == {first: "4", third: "3", fourth: "2"}
    assert run(*arguments).stdout == result.stdout  # in a pipe too: colours were asked for


def test_trace_file(demo_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    run(demo_bundle, "-p", PROMPT, "-n", "4", "--schedule", "static:3@1", "--trace", trace)
    document = json.loads(trace.read_text(encoding="utf-8"))
    assert [token["precision"] for token in document["tokens"]] == [4, 4, 3, 3]
    assert "".join(token["text"] for token in document["tokens"]) == ANSWER
    assert all(token["seconds"] > 0 for token in document["tokens"])
    assert document["finish_reason"] == "length"


def test_options_reach_the_generator(demo_bundle: Path) -> None:
    drawn = [
        "-p",
        "Once",
        "-n",
        "5",
        "--schedule",
        "uniform:2",
        "--temperature",
        "1.5",
        "--top-k",
        "50",
        "--top-p",
        ".9",
    ]
    assert run(demo_bundle, *drawn, "--seed", "1").stdout == run(demo_bundle, *drawn, "--seed", "1").stdout
    stopped = run(demo_bundle, "-p", PROMPT, "-q", "--stop", "to p", "--stop", "zebra", "--threads", "1", "--verify")
    assert stopped.stdout == f"{PROMPT} She loved \n"
    greedy = run(demo_bundle, "-p", "Lily, Lily, Lily,", "-n", "3", "-q", "--repetition-penalty", "1000000").stdout
    assert "Lily" not in greedy.removeprefix("Lily, Lily, Lily,")


def test_chat_keeps_the_conversation_in_the_cache(demo_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "copy"))
    template = copy / "chat_template.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}", encoding="utf-8")
    document = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    document["files"][template.name] = {"size": template.stat().st_size, "sha256": sha256_of(template)}
    (copy / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    trace = tmp_path / "trace.json"
    result = run(copy, "--chat", "-n", "3", "--trace", trace, given=f"{PROMPT}\nThe end.\n\nnot read\n")
    assert result.exit_code == 0
    assert result.stderr.count("answer 3 tokens") == 2
    second = json.loads(trace.read_text(encoding="utf-8"))
    assert second["reused_tokens"] >= 14  # the first message at least
    assert second["reused_tokens"] < second["prompt_tokens"]


def test_chat_needs_a_template(demo_bundle: Path) -> None:
    assert "no chat template" in error_of(run(demo_bundle, "--chat"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "max_new_tokens must be 1 or more, got 0"),
        (["--schedule", "uniform:5"], "unknown precision '5': choose one of 4, 3, 2"),
        (["--schedule", "static:2@3,3@5"], "must fall, never rise"),
        (["--schedule", "fast"], "unknown schedule 'fast'"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--temperature", "nan"], "temperature must be 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--top-p", "2"], "top-p must be in (0, 1]"),
        (["--threads", "0"], "threads must be 1 or more"),
        (["--context-length", "2000"], "context length 2000: the model allows 1 to 1024"),
        (["--context-length", "10"], "14 tokens do not fit the KV cache"),
        (["--context-length", "16", "-n", "9"], "14 prompt and 9 new tokens do not fit"),
        (["--stop", ""], "a stop string must not be empty"),
        (["--trace", "no/such/folder/trace.json"], "cannot write no/such/folder/trace.json: there is no folder"),
        (["--trace", ".", "-n", "1", "-q"], "cannot write . (Is a directory): choose another place"),
    ],
)
def test_bad_values_give_one_line(demo_bundle: Path, arguments: list[str], message: str) -> None:
    assert message in error_of(run(demo_bundle, "-p", PROMPT, *arguments))


def test_bundle_that_is_none_gives_one_line(demo_bundle: Path, tmp_path: Path) -> None:
    assert "has no bundle.json" in error_of(run(tmp_path, "-p", "x"))
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "copy"))
    data = bytearray((copy / "weights.bin").read_bytes())
    data[-1] ^= 1
    (copy / "weights.bin").write_bytes(data)
    assert "does not have the SHA-256" in error_of(run(copy, "-p", "x", "--verify"))


def test_prompt_longer_than_the_context(demo_bundle: Path) -> None:
    message = error_of(run(demo_bundle, "-p", "story " * 2000))
    assert "do not fit the KV cache" in message
    assert "shorten the text" in message


@pytest.mark.parametrize(
    "arguments", [[], ["{bundle}", "--nope"], ["{bundle}", "-n", "many"], ["{bundle}", "-p"], ["{bundle}", "two"]]
)
def test_usage_errors_exit_with_2(demo_bundle: Path, arguments: list[str]) -> None:
    result = run(*(argument.format(bundle=demo_bundle) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_help_and_version() -> None:
    assert "--show-precision" in run("--help").stdout
    assert re.search(r"\d+\.\d+", run("--version").stdout)


def start(*arguments: str | Path, **options: IO[bytes] | int) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload, no-any-return]


def test_reader_that_leaves_causes_no_traceback(demo_bundle: Path) -> None:
    with start(demo_bundle, "-p", PROMPT, "-n", "150", "-q") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == PROMPT[:5].encode()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.interruptible
def test_text_streams_and_ctrl_c_ends_it(demo_bundle: Path) -> None:
    with start(demo_bundle, "-p", PROMPT, "-n", "150", "-q") as process:
        assert process.stdout is not None
        wanted = (PROMPT + ANSWER).encode()
        assert process.stdout.read(len(wanted)) == wanted  # comes long before the end
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"error: interrupted\n"


def test_bytes_that_are_no_text(demo_bundle: Path) -> None:
    with start(demo_bundle, "-n", "1", "-q", stdin=subprocess.PIPE) as process:
        _, errors = process.communicate(b"caf\xe9", timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(rb"error: [^\n]*(UTF-8)[^\n]*\n", errors)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(demo_bundle: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [*COMMAND, str(demo_bundle), "-p", "x", "-n", "1"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
    assert process.returncode != 0
    assert b"error: cannot write the output: No space left on device\n" in process.stderr
    assert b"Traceback" not in process.stderr
