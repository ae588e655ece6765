"""`pmpd-run`: text out of a bundle on the command line."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[text]'`")

from pmpd.runtime.errors import PmpdError

# Warm to cool as precision falls; the same place in the bundle's list of precisions has the same colour.
_COLOURS = ("bright_red", "bright_yellow", "bright_green", "bright_cyan", "bright_blue", "bright_magenta", "white")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Text to continue; `-` or none reads it from standard input.")
@click.option("--chat", is_flag=True, help="Talk: one message a line, an empty line or Ctrl-D ends.")
@click.option("-n", "--max-new-tokens", type=int, help="Stop after so many tokens.  [default: as many as fit]")
@click.option("--schedule", help="uniform:4 or static:3@16,2@32.  [default: the bundle's]")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the k most likely tokens; 0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest p of probability.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="1 is off.")
@click.option("--seed", type=int, help="Makes drawing repeatable.")
@click.option("--stop", multiple=True, help="End before this text (repeatable).")
@click.option("--show-precision", is_flag=True, help="Colour each token by the bits of the weights that made it.")
@click.option("--threads", type=int, help="Threads to compute with.  [default: all processors]")
@click.option("--context-length", type=int, help="Positions of the KV cache.  [default: the model's, at most 4096]")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="Write every token's precision and time to this JSON file."
)
@click.option("--accuracy", help="exact or int8: how kernels compute.  [default: the bundle's]")
@click.option("--kernels", type=click.Path(path_type=Path), help="Use this kernel library instead of the bundle's.")
@click.option("--no-kernels", is_flag=True, help="Run no native code of the bundle: portable graphs only, slow.")
@click.option("--require-fast-kernels", is_flag=True, help="Fail where anything slower than a fast kernel would run.")
@click.option("--show-kernels", is_flag=True, help="Say which kernel ran how often and how long.")
@click.option("--verify", is_flag=True, help="Check the SHA-256 of the weights first.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but the text.")
@click.version_option(package_name="pmpd")
def main(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    threads: int | None,
    context_length: int | None,
    show_precision: bool,
    trace: Path | None,
    accuracy: str | None,
    kernels: Path | None,
    no_kernels: bool,
    require_fast_kernels: bool,
    show_kernels: bool,
    verify: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate text with the model in the folder BUNDLE."""
    if kernels is not None and no_kernels:
        raise click.UsageError("--kernels and --no-kernels exclude each other")
    # What goes wrong raises; what is worth a warning, such as a slow path, is one line.
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, format="warning: %(message)s")
    try:
        from pmpd.runtime import Bundle, Generator, Sampling, Tokenizer
        from pmpd.runtime.console.output import json_text, write_atomically

        if trace is not None and not trace.absolute().parent.is_dir():
            raise PmpdError(f"cannot write {trace}: there is no folder {trace.absolute().parent}")
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        sampling = Sampling(**{name: options.pop(name) for name in names})
        opened = Bundle.open(bundle, verify=verify)
        tokenizer = Tokenizer.from_bundle(opened)
        generator = Generator(
            opened,
            threads=threads,
            context_length=context_length,
            tokenizer=tokenizer,
            kernels=kernels or not no_kernels,
            accuracy=accuracy,
            require_fast_kernels=require_fast_kernels,
        )
        session = _Session(generator, tokenizer, sampling, show_precision, quiet, options)
        if chat:
            session.chat()
        else:
            session.complete(_read_prompt(prompt))
        if show_kernels:
            for line in _kernel_lines(generator.kernels()):
                click.echo(line, err=True)
        if trace is not None:
            write_atomically(trace, json_text(generator.trace.to_dict()))
    except PmpdError as error:
        _fail(str(error))
    except UnicodeDecodeError:
        _fail("standard input is not UTF-8 text")
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # click ends quietly when the reader of a pipe has gone
        _fail(f"cannot write {error.filename or 'the output'}: {error.strerror}")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


class _Session:
    """One run of the command: a generator and how its tokens are shown."""

    def __init__(
        self, generator: Any, tokenizer: Any, sampling: Any, colour: bool, quiet: bool, options: dict[str, Any]
    ) -> None:
        self.generator, self.tokenizer, self.sampling = generator, tokenizer, sampling
        self.colour, self.quiet = colour, quiet
        self.stop_strings = options["stop"]
        self.limit, self.schedule = options["max_new_tokens"], options["schedule"]

    def complete(self, prompt: str) -> None:
        """Print the prompt and what follows it."""
        tokens = self._stream(self.tokenizer.encode(prompt))
        click.echo(prompt, nl=False)
        self._show(tokens)

    def chat(self) -> None:
        """Answer messages until there are no more; the conversation stays in the KV cache."""
        if not self.tokenizer.has_chat_template:
            raise PmpdError("this model has no chat template, so it cannot chat: use -p to continue a text")
        messages: list[dict[str, str]] = []
        while text := _ask():
            messages.append({"role": "user", "content": text})
            answer = self._show(self._stream(self.tokenizer.apply_chat_template(messages), keep_cache=True))
            messages.append({"role": "assistant", "content": answer.strip()})

    def _stream(self, ids: list[int], *, keep_cache: bool = False) -> Iterator[Any]:
        tokens: Iterator[Any] = self.generator.stream(
            ids,
            max_new_tokens=self.limit,
            schedule=self.schedule,
            sampling=self.sampling,
            stop_strings=self.stop_strings,
            keep_cache=keep_cache,
        )
        return tokens

    def _show(self, tokens: Iterator[Any]) -> str:
        precisions = self.generator.bundle.manifest.precisions
        pieces = []
        for token in tokens:
            pieces.append(token.text)
            text = click.style(token.text, fg=_colour(precisions, token.precision)) if self.colour else token.text
            # Colours were asked for, so they are kept when the output goes to a pager or a file.
            click.echo(text, nl=False, color=True if self.colour else None)
        click.echo()
        if not self.quiet:
            click.echo(self._statistics(precisions), err=True)
        return "".join(pieces)

    def _statistics(self, precisions: tuple[int, ...]) -> str:
        trace = self.generator.trace
        parts = [f"prompt {trace.prompt_tokens} tokens"]
        if trace.prefill_tokens_per_second is not None:
            parts[0] += f" at {trace.prefill_tokens_per_second:.1f}/s"
        parts.append(f"answer {len(trace.tokens)} tokens")
        if trace.decode_tokens_per_second is not None:
            parts[1] += f" at {trace.decode_tokens_per_second:.1f}/s"
            parts.append(f"average {trace.average_bits:.2f} bits")
        if self.colour:
            parts.append(" ".join(click.style(f"{bits}-bit", fg=_colour(precisions, bits)) for bits in precisions))
        return ", ".join(parts)


def _kernel_lines(nodes: list[Any]) -> Iterator[str]:
    """Say what ran, a line for each graph, operator, number of bits and kernel."""
    groups: dict[tuple[str, str, int, str], list[Any]] = {}
    for node in nodes:
        if node.kernel is not None:
            groups.setdefault((node.graph, node.op, node.bits, node.kernel), []).append(node)
    for (graph, op, bits, kernel), same in groups.items():
        line = f"{graph}: {len(same)} {op} of {bits} bits: {kernel}"
        if calls := sum(node.calls or 0 for node in same):
            seconds = sum(node.seconds for node in same)
            line += f", {calls} calls of {seconds / calls * 1e6:.1f} µs, {seconds:.3f} s"
        yield line


def _colour(precisions: tuple[int, ...], precision: int) -> str:
    return _COLOURS[precisions.index(precision) % len(_COLOURS)] if precision in precisions else "white"


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("give a prompt with -p, or on standard input, or --chat")
    return sys.stdin.read().removesuffix("\n")


def _ask() -> str:
    if sys.stdin.isatty():
        click.echo(click.style("> ", bold=True), nl=False)
    return sys.stdin.readline().strip()


def _fail(message: str, *, code: int = 1) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
