"""`pmpd-run` as a user types it."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner, Result

from pmpd.runtime import Bundle
from pmpd.runtime.cli import main
from pmpd.runtime.console.output import markdown_table
from pmpd.runtime.console.palette import shades
from pmpd.runtime.format.bundle import sha256_of

PROMPT = "Once upon a time, there was a little girl named Lily."
ANSWER = " She loved to play"  # four tokens at 4 bits
COMMAND = [str(Path(sys.executable).with_name("pmpd-run"))]


def run(*arguments: str | Path | int, given: str | None = None, terminal: bool = False) -> Result:
    """Run the command in this process; an exception that would show a traceback fails the test."""
    result = CliRunner().invoke(
        main, [str(argument) for argument in arguments], input=given, color=terminal, prog_name="pmpd-run"
    )
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
    statistics = (
        r"prompt 14 tokens at [\d.]+/s, answer 4 tokens at [\d.]+/s, average 3\.67 bits, "
        r"ended at the limit of new tokens"
    )
    warning, last = result.stderr.splitlines()
    assert "many times slower" in warning  # the bundle has no kernels
    assert re.fullmatch(statistics, last)


def test_info_says_what_the_bundle_is_and_what_it_costs(demo_bundle: Path) -> None:
    result = run(demo_bundle, "--info", given="not read")
    assert (result.exit_code, result.stderr) == (0, "")
    quality = Bundle.open(demo_bundle).manifest.quality
    assert quality is not None
    assert result.stdout.endswith(f"quality   on {quality.heading}\n{markdown_table(quality.rows())}\n")
    for line in "model     demo: llama, 6.0 M parameters, 5 layers", "bits      4/3/2, prefill at 4", "kernels   none":
        assert f"{line}\n" in result.stdout
    assert "--info answers nothing" in error_of(run(demo_bundle, "--info", "-p", "x"), code=2)


def test_info_of_an_older_bundle_whose_names_hold_control_characters(tmp_path: Path) -> None:
    bundle = shutil.copytree(Path(__file__).parents[1] / "golden" / "v3-llama", tmp_path / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["source"]["model"], manifest["producer"] = "a\x1b[31m", "b\nc"
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    lines = run(bundle, "--info").stdout.splitlines()
    assert (lines[0][:16], lines[1][-12:], lines[-1]) == ("model     a [31m", " made by b c", "quality   not measured")


@pytest.mark.parametrize("arguments", [[], ["-p", "-"]])
def test_prompt_on_stdin(demo_bundle: Path, arguments: list[str]) -> None:
    result = run(demo_bundle, *arguments, "-n", "4", "--quiet", given=f"{PROMPT}\n")
    assert (result.stdout, result.stderr) == (f"{PROMPT}{ANSWER}\n", "")


def test_show_precision_colours_tokens(demo_bundle: Path) -> None:
    arguments = [str(demo_bundle), "-p", PROMPT, "-n", "4", "--show-precision", "--schedule", "static:4@0,3@1,2@2"]
    result = run(*arguments, "--color", "always")
    colours = re.findall(r"\x1b\[38;5;(\d+)m([^\x1b]*)\x1b\[0m", result.stdout)
    assert "".join(text for _, text in colours) == ANSWER
    first, second, third, fourth = (code for code, _ in colours)
    assert first == second  # prefill and step 0, both 4 bits
    assert len({second, third, fourth}) == 3
    legend = dict(re.findall(r"\x1b\[38;5;(\d+)m(\d)-bit\x1b\[0m", result.stderr))
    assert legend == {first: "4", third: "3", fourth: "2"}
    assert [shade.name for shade in shades(3)] == ["blue", "yellow", "red"]  # cool is high, as in the HTML report
    assert [str(shade.terminal) for shade in shades(3)] == [first, third, fourth]


@pytest.mark.parametrize("colour", ["auto", "never"])
def test_no_colours_where_the_output_is_not_a_terminal(demo_bundle: Path, colour: str) -> None:
    result = run(demo_bundle, "-p", PROMPT, "-n", "4", "--show-precision", "--color", colour, terminal=True)
    assert result.stdout == f"{PROMPT}{ANSWER}\n"
    assert "\x1b" not in result.stderr
    assert ("--color always" in result.stderr) == (colour == "auto")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_shows_colours_unless_no_color_is_set(demo_bundle: Path, no_color: bool) -> None:
    outer, inner = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1" if no_color else ""}
    command = [*COMMAND, str(demo_bundle), "-p", PROMPT, "-n", "4", "--show-precision", "-q"]
    subprocess.run(command, stdout=inner, env=environment, check=True, timeout=60)
    os.close(inner)
    shown = os.read(outer, 10_000)
    os.close(outer)
    assert (b"\x1b[38;5;" in shown) == (not no_color)


def test_trace_file(demo_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    run(demo_bundle, "-p", PROMPT, "-n", "4", "--schedule", "static:3@1", "--trace", trace)
    document = json.loads(trace.read_text(encoding="utf-8"))
    assert [token["precision"] for token in document["tokens"]] == [4, 4, 3, 3]
    assert "".join(token["text"] for token in document["tokens"]) == ANSWER
    assert all(token["seconds"] > 0 for token in document["tokens"])
    assert document["finish_reason"] == "length"


def test_json_on_stdout_stands_alone(demo_bundle: Path) -> None:
    result = run(demo_bundle, "-p", PROMPT, "-n", "4", "--json", "-", "-q")
    document = json.loads(result.stdout)
    assert (document["text"], document["finish_reason"], len(document["tokens"])) == (ANSWER, "length", 4)
    assert result.stderr == ""


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


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def chat_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template that spells the roles out."""
    copy = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("chat") / "copy"))
    template = copy / "chat_template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    document = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    document["files"][template.name] = {"size": template.stat().st_size, "sha256": sha256_of(template)}
    (copy / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    return copy


def continuation(bundle: Path, text: str, tokens: int) -> str:
    """What the model says after a text."""
    return run(bundle, "--raw", "-p", text, "-n", str(tokens), "-q").stdout.removeprefix(text)


def test_chat_keeps_the_conversation_in_the_cache(chat_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = run(chat_bundle, "--chat", "-n", "3", "--json", trace, given=f"{PROMPT}\n\nThe end.\n/exit\nnot read\n")
    assert result.exit_code == 0
    assert result.stderr.count("answer 3 tokens") == 2  # an empty line is no message
    second = json.loads(trace.read_text(encoding="utf-8"))
    assert second["reused_tokens"] >= 14  # the first message at least
    assert second["reused_tokens"] < second["prompt_tokens"]


def test_a_prompt_is_a_message_where_there_is_a_chat_template(chat_bundle: Path) -> None:
    result = run(chat_bundle, "-p", "Hello.", "-n", "3")
    assert result.stdout == continuation(chat_bundle, "[user] Hello. ", 3)
    _warning, note, _statistics = result.stderr.splitlines()
    assert "chat template" in note
    assert "--raw" in note
    assert run(chat_bundle, "-n", "3", "-q", given="Hello.\n").stdout == result.stdout
    assert run(chat_bundle, "-p", "Hello.", "--raw", "-n", "3", "-q").stdout.startswith("Hello.")
    system = run(chat_bundle, "-p", "Hello.", "--system", "Be brief.", "-n", "3", "-q")
    assert system.stdout == continuation(chat_bundle, "[system] Be brief. [user] Hello. ", 3)


def test_a_chat_starts_with_the_prompt_and_can_be_reset(chat_bundle: Path) -> None:
    first = continuation(chat_bundle, "[user] Hello. ", 2)
    result = run(chat_bundle, "--chat", "-p", "Hello.", "-n", "2", "-q", given="/reset\nHello.\n")
    assert result.stdout == first * 2
    assert run(chat_bundle, "--chat", "-p", "Hello.", "-n", "2", "-q", given="").stdout == first


def variant(bundle: Path, folder: Path, **files: str) -> Path:
    """Return a copy of a bundle with other text files (dots in names written as __)."""
    copy = Path(shutil.copytree(bundle, folder / "variant"))
    document = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    for name, text in files.items():
        file = copy / name.replace("__", ".")
        file.write_text(text, encoding="utf-8")
        document["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    (copy / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    return copy


def test_a_chat_takes_other_instructions(chat_bundle: Path) -> None:
    given = "/system Be brief.\nHello.\n/reset\nHello.\n/system\nHello.\n"
    result = run(chat_bundle, "--chat", "--system", "Rhyme.", "-n", "2", "-q", given=given)
    brief = continuation(chat_bundle, "[system] Be brief. [user] Hello. ", 2)
    assert result.stdout == brief * 2 + continuation(chat_bundle, "[user] Hello. ", 2)


def test_tools_and_thinking_reach_the_template(chat_bundle: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{{ tools | tojson if tools else 'none' }} {{ enable_thinking }} {{ messages[-1].content }}"
    )
    bundle = variant(chat_bundle, tmp_path, chat_template__jinja=template)
    tools = tmp_path / "tools.json"
    function = '{"name": "f", "parameters": {}}'
    tools.write_text(f"[{function}]", encoding="utf-8")
    result = run(bundle, "-p", "Hi", "--tools", tools, "--no-thinking", "-n", "2", "-q")
    framed = f'[{{"type": "function", "function": {function}}}]'
    assert result.stdout == continuation(bundle, f"{framed} False Hi", 2)
    result = run(bundle, "-p", "Hi", "--thinking", "-n", "2", "-q")
    assert result.stdout == continuation(bundle, "none True Hi", 2)
    assert "has no tools" in error_of(run(chat_bundle, "-p", "Hi", "--tools", tools))
    for text in ("{", "[]", "[1]", "7"):
        tools.write_text(text, encoding="utf-8")
        assert str(tools) in error_of(run(bundle, "-q", "-p", "Hi", "--tools", tools))


@pytest.mark.parametrize(
    "template", ["{{ messages[-1].content }}", "{{ raise_exception('No!') if messages[0].role == 'system' }}Hi"]
)
def test_a_template_without_system_messages_says_so(chat_bundle: Path, tmp_path: Path, template: str) -> None:
    bundle = variant(chat_bundle, tmp_path, chat_template__jinja=template)
    message = error_of(run(bundle, "-q", "-p", "Hi", "--system", "Be brief."))
    assert "has no system messages: leave --system out" in message


def test_sampling_as_the_authors_recommend(chat_bundle: Path, tmp_path: Path) -> None:
    config = {"eos_token_id": 2, "do_sample": True, "temperature": 1.7, "top_k": 20}
    bundle = variant(chat_bundle, tmp_path, generation_config__json=json.dumps(config))
    common = ("-p", "Hello.", "-n", "12", "-q", "--seed", "3")
    wanted = run(bundle, *common, "--temperature", "1.7", "--top-k", "20").stdout
    greedy = run(bundle, *common).stdout
    assert wanted != greedy
    assert run(bundle, *common, "--sampling", "model").stdout == wanted
    assert run(bundle, *common, "--sampling", "model", "--temperature", "0").stdout == greedy
    assert run(chat_bundle, *common, "--sampling", "model").stdout == greedy


def test_ways_of_sampling_that_there_are_not_are_named(chat_bundle: Path, tmp_path: Path) -> None:
    config = {"do_sample": True, "min_p": 1.0, "typical_p": 0.9, "eta_cutoff": 0.1}
    bundle = variant(chat_bundle, tmp_path, generation_config__json=json.dumps(config))
    common = ("-p", "Hello.", "-n", "12", "--no-kernels")
    result = run(bundle, *common, "--sampling", "model")
    assert result.stderr.count("typical_p, eta_cutoff left out") == 1
    assert result.stdout == run(bundle, *common).stdout  # min-p 1 leaves the likeliest token alone
    assert "left out" not in run(bundle, *common).stderr


def test_an_answer_without_text_has_a_reason(chat_bundle: Path) -> None:
    text = continuation(chat_bundle, "[user] Hello. ", 8).strip()[0]
    result = run(chat_bundle, "-p", "Hello.", "--stop", text)
    assert result.stdout.strip() == ""
    assert result.stderr.splitlines()[-1].endswith("ended by --stop")


def test_chat_needs_a_template(demo_bundle: Path) -> None:
    assert "no chat template" in error_of(run(demo_bundle, "--chat"))
    assert "no chat template" in error_of(run(demo_bundle, "--system", "x", "-p", "x"))


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
        (["--min-p", "2"], "min-p must be 0 (off) to 1, got 2.0"),
        (["--top-p", "2"], "top-p must be in (0, 1]"),
        (["--threads", "0"], "threads must be 1 or more"),
        (["--context-length", "2000"], "context length 2000: the model allows 1 to 1024"),
        (["--context-length", "10"], "14 tokens do not fit the KV cache"),
        (["--context-length", "16", "-n", "9"], "14 prompt and 9 new tokens do not fit"),
        (["--stop", ""], "a stop string must not be empty"),
        (["--trace", "no/such/folder/trace.json"], "cannot write no/such/folder/trace.json: there is no folder"),
        (["--trace", "."], ". is a folder: give the name of a file for the result"),
    ],
)
def test_bad_values_give_one_line(demo_bundle: Path, arguments: list[str], message: str) -> None:
    assert message in error_of(run(demo_bundle, "-q", "-p", PROMPT, *arguments))


def test_bundle_that_is_none_gives_one_line(demo_bundle: Path, tmp_path: Path) -> None:
    assert "has no bundle.json" in error_of(run(tmp_path, "-p", "x"))
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "copy"))
    data = bytearray((copy / "weights.bin").read_bytes())
    data[-1] ^= 1
    (copy / "weights.bin").write_bytes(data)
    assert "does not have the SHA-256" in error_of(run(copy, "-p", "x", "--verify"))


def test_prompt_longer_than_the_context(demo_bundle: Path) -> None:
    message = error_of(run(demo_bundle, "-q", "-p", "story " * 2000))
    assert "do not fit the KV cache" in message
    assert "shorten the text" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing argument 'BUNDLE'"),
        (["{bundle}", "--nope"], "no such option"),
        (["{bundle}", "-n", "many"], "invalid value for '-n' / '--max-new-tokens': 'many' is not a valid integer"),
        (["{bundle}", "-p"], "option '-p' requires an argument"),
        (["{bundle}", "two"], "got unexpected extra argument (two)"),
        (["{bundle}", "-p", "x", "--chat", "--raw"], "--chat and --raw exclude each other"),
        (["{bundle}", "-p", "x", "--system", "x", "--raw"], "--raw and --system exclude each other"),
        (["{bundle}", "-p", "x", "--no-thinking", "--raw"], "--raw and --thinking exclude each other"),
        (["{bundle}", "-p", "x", "--no-kernels", "--kernels", "x"], "--kernels and --no-kernels exclude each other"),
    ],
)
def test_usage_errors_exit_with_2(demo_bundle: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(bundle=demo_bundle) for argument in arguments))
    assert result.stdout == ""
    line = error_of(result, code=2)
    assert line.startswith(message)
    assert line.endswith("(see `pmpd-run --help`)")


def test_help_and_version() -> None:
    assert "--show-precision" in run("--help").stdout
    assert re.search(r"\d+\.\d+", run("--version").stdout)


def start(*arguments: str | Path, **options: IO[bytes] | int) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_reader_that_leaves_causes_no_traceback(demo_bundle: Path) -> None:
    with start(demo_bundle, "-p", PROMPT, "-n", "150", "-q") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == PROMPT[:5].encode()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.interruptible
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_text_streams_until_sigint_or_sigterm_ends_it(demo_bundle: Path, number: signal.Signals) -> None:
    with start(demo_bundle, "-p", PROMPT, "-n", "150", "-q") as process:
        assert process.stdout is not None
        wanted = (PROMPT + ANSWER).encode()
        assert process.stdout.read(len(wanted)) == wanted  # comes long before the end
        assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == b"error: interrupted\n"


class Terminal:
    """A chat in a pseudo-terminal that shows what the command prints, and not what is typed."""

    def __init__(self, *arguments: str | Path) -> None:
        import fcntl
        import termios

        self.outer, inner = os.openpty()
        modes = termios.tcgetattr(inner)
        modes[1] &= ~termios.OPOST
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(inner, termios.TCSANOW, modes)
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--chat"],
            stdin=inner,
            stdout=inner,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def type(self, text: str) -> None:
        os.write(self.outer, text.encode())

    def until(self, pattern: str) -> str:
        """Read until the pattern matches all that has been read, and return that."""
        shown = ""
        while re.fullmatch(pattern, shown, re.DOTALL) is None:
            ready, _, _ = select.select([self.outer], [], [], 60)
            assert ready, f"waited for {pattern!r} after {shown!r}"
            shown += os.read(self.outer, 10_000).decode()
        return shown

    def end(self) -> str:
        """Wait for the end, and return standard error."""
        _, errors = self.process.communicate(timeout=60)
        os.close(self.outer)
        return errors.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.interruptible
def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(chat_bundle: Path, tmp_path: Path) -> None:
    template = TEMPLATE + "{% if add_generation_prompt %}[assistant]{% endif %}"
    endless = json.dumps({"eos_token_id": 4095})
    bundle = variant(chat_bundle, tmp_path, chat_template__jinja=template, generation_config__json=endless)
    trace = tmp_path / "trace.json"
    chat = Terminal(bundle, "--schedule", "uniform:4", "--trace", trace)
    chat.until("> ")
    answers = []
    for message in ("Hello.", "And then?"):
        chat.type(f"{message}\n")
        shown = chat.until(".{20,}")
        chat.type("\x03")
        answers.append((shown + chat.until(".*\n> ")).removesuffix("\n> "))
    chat.type("/exit\n")
    assert chat.process.wait(timeout=60) == 0
    errors = chat.end()
    assert errors.count("ended by Ctrl-C") == 2
    assert "error" not in errors
    # The partial answer is part of the conversation: the next answer is that of a fresh run over the same text.
    document = json.loads(trace.read_text(encoding="utf-8"))
    assert (document["text"], document["finish_reason"]) == (answers[1], None)
    assert document["reused_tokens"] > 16  # the first message, 14 tokens, and its answer
    history = f"[user] Hello. [assistant] {answers[0].strip()} [user] And then? [assistant]"
    fresh = run(bundle, "--raw", "-p", history, "--schedule", "uniform:4", "-n", len(document["tokens"]), "-q")
    assert fresh.stdout == f"{history}{answers[1]}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.interruptible
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("answering", [False, True])
def test_other_signals_and_ctrl_c_at_the_prompt_end_a_chat(
    chat_bundle: Path, number: signal.Signals, answering: bool
) -> None:
    if answering and number == signal.SIGINT:
        pytest.skip("ends the answer only")
    chat = Terminal(chat_bundle, "-q")
    chat.until("> ")
    if answering:
        chat.type("Hello.\n")
        chat.until(".{10,}")
    chat.process.send_signal(number)
    chat.type("\n")  # readline sleeps over a signal that comes just before it waits for a key
    errors = chat.end()
    assert (chat.process.returncode, errors) == (128 + number, "error: interrupted\n")


def test_bytes_that_are_no_text(demo_bundle: Path) -> None:
    with start(demo_bundle, "-n", "1", "-q", stdin=subprocess.PIPE) as process:
        _, errors = process.communicate(b"caf\xe9", timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(rb"error: [^\n]*(UTF-8)[^\n]*\n", errors)


def test_closed_stdin_is_a_usage_error(demo_bundle: Path) -> None:
    shell = ["sh", "-c", 'exec "$0" "$@" <&-', *COMMAND, str(demo_bundle), "-n", "1"]
    process = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=60)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: give a prompt with -p")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(demo_bundle: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [*COMMAND, str(demo_bundle), "-p", "x", "-n", "1"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == b"error: cannot write the output: No space left on device"
    assert b"Traceback" not in process.stderr
