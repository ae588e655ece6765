"""`pmpd-run`: generate text with a bundle on the command line."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[text]'`")

from pmpd.runtime.console.command import (
    FILE,
    Command,
    check_outputs,
    first_interrupt,
    is_quiet,
    warn_unverified,
    write_result,
)
from pmpd.runtime.console.output import byte_text, json_text, markdown_table
from pmpd.runtime.console.palette import shade_of
from pmpd.runtime.errors import ContextLengthError, PmpdError, one_line

if TYPE_CHECKING:
    from pmpd.runtime import Bundle, Generator, NodeKernel, Sampling, Token, Tokenizer

log = logging.getLogger("pmpd.runtime")

_REASONS = {
    "stop_id": "ended by the model",
    "stop_string": "ended by --stop",
    "length": "ended at the limit of new tokens",
    None: "ended by Ctrl-C",
}
_EXAMPLES = (
    'pmpd-run demo-pmpd -p "Once upon a time" -n 100 --schedule static:3@16,2@32 --show-precision',
    'pmpd-run chat-pmpd -p "What is the capital of France?"',
    'pmpd-run chat-pmpd --chat --system "Answer in one sentence."',
    "pmpd-run demo-pmpd --info",
)


@click.command("pmpd-run", cls=Command, extra="text", examples=_EXAMPLES)
@click.argument("bundle", type=FILE)
@click.option(
    "-p",
    "--prompt",
    metavar="TEXT",
    help="Message to answer; for a model without a chat template, text to continue. Without it, or with -, the prompt "
    "is read from standard input.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, even if the model has a chat template.")
@click.option(
    "--chat",
    is_flag=True,
    help="Hold a conversation, one message per line: /reset starts over, /system TEXT too, with other instructions; "
    "Ctrl-C ends an answer; /exit, Ctrl-D, or Ctrl-C at the prompt ends the command.",
)
@click.option("--system", metavar="TEXT", help="Instructions for the model, ahead of the conversation.")
@click.option(
    "--tools",
    type=FILE,
    metavar="FILE",
    help="JSON list of functions that the model may call; a call comes out as text, in the model's own notation.",
)
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Let the model think before it answers, or not, where its chat template has the choice.  "
    "[default: the template's]",
)
@click.option(
    "-n", "--max-new-tokens", type=int, metavar="N", help="Stop after N new tokens.  [default: as many as fit]"
)
@click.option(
    "--schedule",
    metavar="SPEC",
    help="Bits of the weights at each step: uniform:4, or static:3@16,2@32 for 3 bits from step 16 and 2 from step 32. "
    "prefill:3,uniform:3 runs the prompt at 3 bits, too.  [default: the bundle's]",
)
@click.option(
    "--sampling",
    "preset",
    type=click.Choice(["greedy", "model"]),
    default="greedy",
    show_default=True,
    help="What the next four options are unless given: off, or as the model's authors recommend.",
)
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    help="Randomness of sampling; 0 always takes the most likely token.",
)
@click.option("--top-k", type=int, metavar="K", help="Sample from the K most likely tokens; 0 is off.")
@click.option(
    "--top-p",
    type=float,
    metavar="P",
    help="Sample from the most likely tokens whose probabilities add up to P; 1 is off.",
)
@click.option(
    "--min-p",
    type=float,
    metavar="P",
    help="Sample from tokens that are at least P times as likely as the likeliest; 0 is off.",
)
@click.option(
    "--repetition-penalty", type=float, metavar="X", help="Make tokens of the text so far less likely; 1 is off."
)
@click.option("--seed", type=int, metavar="N", help="Seed of sampling: the same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable.")
@click.option("--show-precision", is_flag=True, help="Colour each token by the precision of its weights.")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="When to use colours; auto: on a terminal, unless NO_COLOR is set.",
)
@click.option("--threads", type=int, metavar="N", help="Threads to compute with.  [default: all processors]")
@click.option(
    "--context-length",
    type=int,
    metavar="N",
    help="Room for tokens, prompt included.  [default: the model's, at most 4096]",
)
@click.option(
    "--json",
    "--trace",
    "json_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write the answer, and the precision and time of each token, as JSON; - prints JSON instead of text.",
)
@click.option(
    "--accuracy", metavar="NAME", help="Arithmetic of the kernels: int8 (fast) or exact.  [default: the bundle's]"
)
@click.option("--kernels", type=FILE, metavar="FILE", help="Use this kernel library instead of the bundle's.")
@click.option("--no-kernels", is_flag=True, help="Do not load native code from the bundle; many times slower.")
@click.option("--require-fast-kernels", is_flag=True, help="Fail if any product would run without a fast kernel.")
@click.option("--show-kernels", is_flag=True, help="Print which kernels ran, how often and how long.")
@click.option("--verify", is_flag=True, help="Check the SHA-256 of the weights first.")
@click.option("--info", is_flag=True, help="Print what the bundle is and what each precision costs, and stop.")
@click.version_option(package_name="pmpd")
def main(
    bundle: Path,
    prompt: str | None,
    raw: bool,
    chat: bool,
    system: str | None,
    tools: Path | None,
    thinking: bool | None,
    preset: str,
    color: str,
    threads: int | None,
    context_length: int | None,
    show_precision: bool,
    json_file: Path | None,
    accuracy: str | None,
    kernels: Path | None,
    no_kernels: bool,
    require_fast_kernels: bool,
    show_kernels: bool,
    verify: bool,
    info: bool,
    **options: Any,
) -> None:
    """Generate text with the model in the folder BUNDLE.

    The text goes to standard output; statistics and notes go to standard error.
    """
    if kernels is not None and no_kernels:
        raise click.UsageError("--kernels and --no-kernels exclude each other")
    if info and (chat or json_file is not None or prompt is not None):
        raise click.UsageError("--info answers nothing: leave out --prompt, --chat and --json")
    if chat and raw:
        raise click.UsageError("--chat and --raw exclude each other")
    for option, value in (("--system", system), ("--tools", tools), ("--thinking", thinking)):
        if raw and value is not None:
            raise click.UsageError(f"--raw and {option} exclude each other")
    from pmpd.runtime import Bundle, Generator, Sampling, Tokenizer
    from pmpd.runtime.decode.sampling import left_out

    check_outputs(json_file)
    text = "" if chat or info else _read_prompt(prompt)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    chosen = {name: value for name in names if (value := options.pop(name)) is not None}
    sampling = Sampling(**chosen)
    opened = Bundle.open(bundle, verify=verify)
    warn_unverified(bundle, verified=opened.manifest.verified)
    if info:
        click.echo("\n".join(_info(opened)))
        return
    if preset == "model":
        sampling = replace(Sampling.from_config(opened.generation_config), **chosen)
        if others := left_out(opened.generation_config):
            log.warning("generation_config.json: %s left out: there is no such way of sampling here", ", ".join(others))
    tokenizer = Tokenizer.from_bundle(opened)
    _check_template(tokenizer, chat=chat, system=system, tools=tools)
    generator = Generator(
        opened,
        threads=threads,
        context_length=context_length,
        tokenizer=tokenizer,
        kernels=kernels or not no_kernels,
        accuracy=accuracy,
        require_fast_kernels=require_fast_kernels,
    )
    session = _Session(
        generator,
        tokenizer,
        sampling,
        system=system,
        tools=None if tools is None else _read_tools(tools),
        variables={} if thinking is None else {"enable_thinking": thinking, "thinking": thinking},
        colours=show_precision and _use_colours(color),
        silent=json_file is not None and str(json_file) == "-",
        **options,
    )
    if show_precision and not session.colours and color == "auto":
        log.info("colours are off, because the output is not a terminal or NO_COLOR is set: --color always")
    if chat:
        session.chat(prompt)
    elif raw or not tokenizer.has_chat_template:
        session.complete(text)
    else:
        log.info("the prompt goes through the model's chat template as one message; --raw continues it as plain text")
        session.answer(text)
    if show_kernels:
        for line in _kernel_lines(generator.kernels()):
            click.echo(line, err=True)
    document = {"bundle": str(bundle), "text": session.text, **generator.trace.to_dict()}
    if session.silent:
        click.echo(json_text(document), nl=False)
    else:
        write_result(json_file, lambda: json_text(document))


class _Session:
    """One run of the command: a generator, the conversation so far, and how tokens are shown."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        system: str | None,
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        colours: bool,
        silent: bool,
        max_new_tokens: int | None,
        schedule: str | None,
        stop: tuple[str, ...],
    ) -> None:
        self.generator, self.tokenizer, self.sampling = generator, tokenizer, sampling
        self.colours, self.silent = colours, silent
        self.limit, self.schedule, self.stop_strings = max_new_tokens, schedule, stop
        self.text = ""  # of the last answer
        self._interactive = False  # whether Ctrl-C ends an answer, and the prompt comes back
        self._template: dict[str, Any] = {"tools": tools, "variables": variables}
        self._start_over(system)

    def _start_over(self, system: str | None) -> None:
        self._system = system
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def complete(self, prompt: str) -> None:
        """Print the prompt and its continuation."""
        tokens = self._stream(self.tokenizer.encode(prompt))
        self._print(prompt)
        self._show(tokens)

    def answer(self, message: str) -> None:
        """Print the answer to the next message; the conversation stays in the KV cache."""
        self._messages.append({"role": "user", "content": message})
        try:
            ids = self.tokenizer.apply_chat_template(self._messages, **self._template)
            self._show(self._stream(ids, keep_cache=True))
        except ContextLengthError:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": self.text.strip()})

    def chat(self, first: str | None) -> None:
        """Answer messages until there are no more."""
        self._interactive = sys.stdin is not None and sys.stdin.isatty()
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 - lets `input` edit the line and recall earlier ones
            log.info("one message per line; /reset or /system TEXT starts over; Ctrl-C ends an answer, /exit the chat")
        while (message := _read_message(self._interactive) if first is None else first) is not None:
            first = None
            match message.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/reset":
                    self._start_over(self._system)
                    log.info("the conversation starts over")
                case command if command.split()[0] == "/system":
                    text = command.removeprefix("/system").strip()
                    if text:
                        _check_template(self.tokenizer, chat=True, system=text, tools=None)
                    self._start_over(text or None)
                    log.info("the conversation starts over with %s", "these instructions" if text else "none")
                case text:
                    try:
                        self.answer(text)
                    except ContextLengthError as error:
                        if not self._interactive:
                            raise
                        log.error("%s, or start over with /reset", error)

    def _stream(self, ids: list[int], *, keep_cache: bool = False) -> Iterator[Token]:
        return self.generator.stream(
            ids,
            max_new_tokens=self.limit,
            schedule=self.schedule,
            sampling=self.sampling,
            stop_strings=self.stop_strings,
            keep_cache=keep_cache,
        )

    def _show(self, tokens: Iterator[Token]) -> None:
        precisions = self.generator.bundle.manifest.precisions
        pieces = []
        with first_interrupt() if self._interactive else nullcontext(lambda: False) as interrupted:
            for token in tokens:
                text = token.text or ""
                pieces.append(text)
                self._print(self._coloured(text, token.precision, precisions))
                if interrupted():
                    break
        self._print("\n")
        self.text = "".join(pieces)
        if not is_quiet():
            click.echo(self._statistics(precisions), err=True, color=self.colours or None)

    def _print(self, text: str) -> None:
        if not self.silent:
            # Colours are decided here, not by click, which drops them wherever the output is not a terminal.
            click.echo(text, nl=False, color=True if self.colours else None)

    def _coloured(self, text: str, precision: float, precisions: tuple[float, ...]) -> str:
        if not self.colours or precision not in precisions:
            return text
        return click.style(text, fg=shade_of(precision, precisions).terminal)

    def _statistics(self, precisions: tuple[float, ...]) -> str:
        trace = self.generator.trace
        prompt = f"prompt {trace.prompt_tokens} tokens"
        if trace.prefill_tokens_per_second is not None:
            prompt += f" at {trace.prefill_tokens_per_second:.1f}/s"
        parts = [prompt, f"answer {len(trace.tokens)} tokens"]
        if trace.decode_tokens_per_second is not None:
            parts[1] += f" at {trace.decode_tokens_per_second:.1f}/s"
            average = f"average {trace.average_bits:.2f} bits"
            repeats = sum(token.first_pass is not None for token in trace.tokens)
            parts.append(f"{average} with {repeats} steps run twice" if repeats else average)
        parts.append(_REASONS[trace.finish_reason])
        if self.colours:
            parts.append(" ".join(self._coloured(f"{bits}-bit", bits, precisions) for bits in precisions))
        return ", ".join(parts)


def _check_template(tokenizer: Tokenizer, *, chat: bool, system: str | None, tools: Path | None) -> None:
    """Raise PmpdError where the chat template cannot do what was asked for."""
    if (chat or system is not None or tools is not None) and not tokenizer.has_chat_template:
        raise PmpdError("this model has no chat template, so it cannot chat: use -p to continue a text")
    if system is not None and not tokenizer.has_system_role:
        raise PmpdError(
            "this model's chat template has no system messages: leave --system out, and begin the first message with "
            "the instructions"
        )
    if tools is not None and not tokenizer.has_tools:
        raise PmpdError("this model's chat template has no tools: leave --tools out, and describe them in the prompt")


def _read_tools(file: Path) -> list[dict[str, Any]]:
    """Return a list of functions as templates take them; a bare function gets the frame around it."""
    try:
        tools = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PmpdError(f"{file} cannot be read as JSON ({one_line(error)}): give a list of functions") from None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise PmpdError(f'{file} is not a JSON list of functions, [{{"name": …, "parameters": …}}, …]')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _info(bundle: Bundle) -> Iterator[str]:
    """Yield what `--info` prints, line by line."""
    from pmpd.runtime.format.precision import describe_mix

    manifest = bundle.manifest
    model, source, quality = manifest.architecture, manifest.source, manifest.quality
    size = sum(entry.size for entry in manifest.files.values())
    kernels = f"{', '.join(manifest.kernels)}: {manifest.accuracy}" if manifest.kernels else "none"
    name, producer = one_line(f"{source.model}: {model.family}"), one_line(manifest.producer)
    yield f"model     {name}, {model.parameters / 1e6:,.1f} M parameters, {model.layers} layers"
    yield f"bundle    {byte_text(size)}, context {manifest.context_length}, made by {producer}"
    yield f"bits      {'/'.join(map(str, manifest.precisions))}, prefill at {manifest.prefill_precision}"
    yield from (f"mix       {name}: {one_line(describe_mix(planes), 500)}" for name, planes in manifest.mixes.items())
    for name, text in manifest.schedules.items():
        chosen = " (default)" if name == manifest.default_schedule else ""
        yield f"schedule  {name}{chosen}: {bundle.why(name) or text}"
    yield f"kernels   {kernels}"
    if quality is None:
        yield "quality   not measured"
    else:
        yield f"quality   on {quality.heading}"
        yield markdown_table(quality.rows())


def _kernel_lines(nodes: list[NodeKernel]) -> Iterator[str]:
    """Yield a line for each graph, operator, number of bits and kernel."""
    groups: dict[tuple[str, str, int, str], list[NodeKernel]] = {}
    for node in nodes:
        if node.kernel is not None:
            groups.setdefault((node.graph, node.op, node.bits, node.kernel), []).append(node)
    for (graph, op, bits, kernel), same in groups.items():
        line = f"{graph}: {len(same)} {op} of {bits} bits: {kernel}"
        if calls := sum(node.calls or 0 for node in same):
            seconds = sum(node.seconds or 0.0 for node in same)
            line += "".join(f", {node.finished:.2%} finished" for node in same if node.finished is not None)
            line += f", {calls} calls of {seconds / calls * 1e6:.1f} µs, {seconds:.3f} s"
        yield line


def _use_colours(color: str) -> bool:
    if color == "auto":
        return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return color == "always"


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise click.UsageError("give a prompt with -p, or on standard input, or use --chat")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise PmpdError("standard input is not UTF-8 text") from None


def _read_message(interactive: bool) -> str | None:
    """Return the next line of standard input, None at its end."""
    if sys.stdin is None:
        return None
    try:
        if interactive:
            return input("> ")
        return sys.stdin.readline() or None
    except EOFError:
        click.echo()  # Ctrl-D leaves the cursor behind the prompt
        return None
    except UnicodeDecodeError:
        raise PmpdError("standard input is not UTF-8 text") from None


if __name__ == "__main__":
    main()
