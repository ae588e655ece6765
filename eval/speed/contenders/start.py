"""A process that loads a model and writes tokens, and says when and in how much memory. See `pmpd.eval.speed.start`.

Stand-alone, as the other side of `serve`: a peer's Python need not have this project. Each line of its output is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["LOADERS", "bundle_tokens", "gguf_tokens", "main", "resident", "say"]


def bundle_tokens(options: Mapping[str, Any]) -> Iterator[Any]:
    """Load a bundle as `pmpd-run` does; yield None when it is loaded, then tokens."""
    from pmpd.runtime import Bundle, Generator, Tokenizer

    bundle = Bundle.open(options["path"])
    tokenizer = Tokenizer.from_bundle(bundle)
    positions = min(options["positions"], bundle.manifest.context_length)
    generator = Generator(bundle, tokenizer=tokenizer, threads=options["threads"], context_length=positions)
    yield None
    yield from generator.stream(tokenizer.encode(options["prompt"]), max_new_tokens=options["tokens"])


def gguf_tokens(options: Mapping[str, Any]) -> Iterator[Any]:
    """Load a GGUF file with llama-cpp-python; yield None when it is loaded, then tokens."""
    import llama_cpp

    threads = options["threads"]
    model = llama_cpp.Llama(
        options["path"], n_ctx=options["positions"], n_threads=threads, n_threads_batch=threads, verbose=False
    )
    yield None
    yield from model.generate(model.tokenize(options["prompt"].encode()), temp=0.0)


LOADERS = {"bundle": bundle_tokens, "gguf": gguf_tokens}


def resident() -> dict[str, int]:
    """Return this process's resident memory in bytes: anonymous, mapped from files, shared."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}


def say(event: str) -> None:
    """Write a line about an event that has just happened."""
    sys.stdout.write(json.dumps({"event": event, **resident()}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Say "loaded", "first" (token) and "done", each with the resident memory."""
    options = json.loads(sys.argv[1])
    tokens = LOADERS[options["kind"]](options)
    for number, _ in enumerate(tokens):
        name = {0: "loaded", 1: "first"}.get(number)
        if name:
            say(name)
        if number == options["tokens"]:
            break
    say("done")


if __name__ == "__main__":
    main()
