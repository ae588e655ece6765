"""The worker's side: one contender in a process of its own, which answers requests when it is its turn.

    PYTHON -P serve.py make|serve CONTENDER.py OPTIONS

CONTENDER.py defines ``load(options)``, which returns something with ``facts`` (JSON data) and ``run(**request)``, and
``make(options)`` where there are models to make first. With ``logits(prompt=, answer=)`` it can also be asked how well
it predicts a text. Requests and answers are JSON, a line each, on stdin and stdout.
This file and the contenders of peers need nothing of this project, for peers live in environments of their own.
"""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "peak_memory", "score"]


def peak_memory() -> int:
    """Return the most memory in bytes that this process ever had resident, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent from before this program was started
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))
        if peak:
            return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def score(contender: Any, *, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
    """Return the negative log-likelihood in nats of each token of `answer` but the first, as ``{"nll": [...]}``."""
    import numpy as np

    nll = []
    for row, target in zip(contender.logits(prompt=prompt, answer=answer), answer[1:], strict=True):
        x = np.asarray(row, np.float64)  # [V]
        x = x - x.max()
        nll.append(float(np.log(np.exp(x).sum()) - x[target]))
    return {"nll": nll}


def main(arguments: Sequence[str]) -> None:
    """Serve until stdin ends; the first answer is the contender's facts."""
    # Libraries print what they like: it must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")

    action, path, text = arguments
    try:
        contender, options = runpy.run_path(path), json.loads(text)
        if action == "make":
            contender["make"](options)
            answer({})
            return
        loaded = contender["load"](options)
        answer(loaded.facts)
        for request in sys.stdin:
            begin = time.process_time()
            values = json.loads(request)
            measured = score(loaded, **values) if "answer" in values else loaded.run(**values)
            answer({**measured, "cpu_seconds": time.process_time() - begin, "peak_bytes": peak_memory()})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
