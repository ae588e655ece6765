"""The options that commands have for the items of a task."""

from __future__ import annotations

import click

from pmpd.runtime.console.command import combine

__all__ = ["PROMPT_OPTIONS", "TASK_OPTIONS", "WORKER_OPTIONS"]


def _unescaped(_context: click.Context, _parameter: click.Parameter, template: str | None) -> str | None:
    r"""Return a template with ``\n`` and ``\t``, as a shell passes them in plain quotes, made one character."""
    return None if template is None else template.replace(r"\n", "\n").replace(r"\t", "\t")


PROMPT_OPTIONS = combine(
    click.option("--max-new-tokens", type=int, metavar="N", help="Tokens per answer.  [default: the task's]"),
    click.option(
        "--prompt-template",
        metavar="TEXT",
        callback=_unescaped,
        help=r"The prompt, with {field} for a field of the record and \n for a new line.  [default: the task's]",
    ),
    click.option(
        "--reference-field",
        metavar="NAME",
        help="Field with the reference text.  [default: the task's; else the fp model's answer is the reference, or "
        "that of the highest precision where no fp model is run]",
    ),
    click.option(
        "--chat/--no-chat",
        default=None,
        help="Send prompts through the model's chat template.  [default: if both the task and the model have chats]",
    ),
)
"""What becomes of a record: the prompt, the reference, and the length of the answer."""

TASK_OPTIONS = combine(
    click.option(
        "--limit",
        type=int,
        metavar="N",
        help="Use the first N records only (perplexity: N windows from all over the text).",
    ),
    PROMPT_OPTIONS,
)
"""Fields of `pmpd.eval.Settings`, of the same names."""

WORKER_OPTIONS = combine(
    click.option(
        "--workers",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Processes that answer, side by side (Ray).",
    ),
    click.option(
        "--address", metavar="HOST:PORT", help="Ray cluster for the workers; its nodes have BUNDLE at this path."
    ),
)
"""What answers."""
