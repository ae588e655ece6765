"""The floating-point model that everything is compared with: the source checkpoint, unquantized, in float32."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmpd.eval.measure.models import Answer, Forced
from pmpd.runtime import Bundle
from pmpd.runtime.errors import MissingExtraError, PmpdError, one_line

if TYPE_CHECKING:
    from pmpd.exporter.source.gguf.checkpoint import GgufCheckpoint

__all__ = ["BACKENDS", "Reference", "ReferenceCheckpoint"]


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """A folder or GGUF file that fits a bundle; `bits` are those of its weights as they are read (16 or 32)."""

    path: Path
    bits: int

    @classmethod
    def find(cls, bundle: Bundle, override: str | None = None) -> ReferenceCheckpoint:
        """Find the checkpoint that a bundle was made from, or `override` (a folder, GGUF file, alias or hub id).

        Raises:
            PmpdError: it cannot be found or read, or has another vocabulary than the bundle.
            MissingExtraError: transformers or torch is not installed.
        """
        source = bundle.manifest.source
        try:
            import torch  # noqa: F401 - transformers reads no checkpoint without it
            from transformers import AutoConfig
        except ImportError as error:
            raise MissingExtraError(error.name or "transformers", "eval") from None
        if override is not None and Path(override).is_dir():
            path = Path(override)
        else:
            path = _resolve(override or source.model, None if override else source.revision)
        if path.is_file():
            checkpoint = _open_file(path)
            tokens = checkpoint.config["vocab_size"]
            bits = 32 if checkpoint.matrix_type == "float32" else 16
        else:
            try:
                config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise PmpdError(
                    f"reference {path} is not a checkpoint that transformers can read ({_first_line(error)}): "
                    "give another with --reference"
                ) from None
            tokens = config.get_text_config().vocab_size
            bits = 16 if str(config.dtype).endswith("16") else 32
        vocab_size = bundle.manifest.architecture.vocab_size
        if tokens != vocab_size:
            raise PmpdError(
                f"reference {path} has {tokens} tokens, the bundle {vocab_size}: "
                "give the checkpoint that the bundle was made from with --reference"
            )
        return cls(path, bits)

    def load(self, backend: str, *, threads: int) -> Reference:
        """Load it into a backend of `BACKENDS`, to compute with `threads` threads.

        Raises:
            PmpdError: it cannot be loaded.
            MissingExtraError: the backend's package is not installed.
        """
        try:
            with warnings.catch_warnings():  # the export of optimum warns of every branch that it traces
                warnings.simplefilter("ignore")
                return BACKENDS[backend](self, threads)
        except PmpdError:
            raise
        except Exception as error:  # each backend has its own kinds, and none of them common
            raise PmpdError(
                f"reference {self.path} cannot be loaded with {backend} ({_first_line(error)}): "
                "fetch it again, or try the other --reference-backend"
            ) from None


def _resolve(model: str, revision: str | None) -> Path:
    try:
        from pmpd.exporter.source.models import resolve_model
    except ImportError as error:
        raise MissingExtraError(error.name or "pmpd.exporter", "export") from None
    try:
        return resolve_model(model, revision=revision)
    except PmpdError as error:
        raise PmpdError(f"no fp reference: {error} (choose one with --reference)") from None


def _open_file(path: Path) -> GgufCheckpoint:
    from pmpd.exporter.source.gguf.checkpoint import GgufCheckpoint

    return GgufCheckpoint.open(path, name=path.name)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class Reference:
    """A causal language model with the forward call of transformers, decoding greedily, batch 1.

    Args:
        model: called with `input_ids`, `attention_mask` and `past_key_values`.
        bits: bits of the stored weights, reported as the precision.
        last_logits: arguments that limit the logits to the last position, where the model knows how.
    """

    def __init__(self, model: Any, *, bits: int, last_logits: Mapping[str, Any] | None = None) -> None:
        self._model = model
        self._bits = bits
        self._last_logits = last_logits or {}

    def _append(self, ids: Sequence[int], cache: Any, length: int, **options: Any) -> tuple[Any, Any]:
        """Run tokens after the `length` that the cache holds; return logits ``[positions, V]`` and the cache."""
        import torch

        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(ids)]),
                attention_mask=torch.ones(1, length + len(ids), dtype=torch.int64),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return output.logits[0], output.past_key_values

    def warm_up(self, prompt: Sequence[int]) -> None:
        """Run a prefill and a decode step."""
        self.generate(prompt[:1], max_new_tokens=2, stop_ids=())

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        """Answer a prompt greedily."""
        ids: list[int] = []
        seconds: list[float] = []
        begin = time.perf_counter()
        logits, cache = self._append(prompt, None, 0, **self._last_logits)
        prefill_seconds = time.perf_counter() - begin
        while (token := int(logits[-1].argmax())) not in stop_ids:
            ids.append(token)
            now = time.perf_counter()
            seconds.append(now - begin)
            if len(ids) == max_new_tokens:
                break
            begin = now
            logits, cache = self._append([token], cache, len(prompt) + len(ids) - 1)
        return Answer(
            ids=tuple(ids),
            precisions=(self._bits,) * len(ids),
            seconds=tuple(seconds),
            prefill_seconds=prefill_seconds,
        )

    def generate_together(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Answer several prompts greedily, side by side: weights are read once for all. Returns the answers' tokens.

        Shorter prompts are padded on the left, which rounds sums in another order than `generate` does.
        """
        import torch

        longest = max(map(len, prompts))
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        answers = [list[int]() for _ in prompts]
        unfinished, cache = set(range(len(prompts))), None
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    **self._last_logits,
                )
                cache = output.past_key_values
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
                for row in list(unfinished):
                    if (token := int(ids[row])) in stop_ids:
                        unfinished.discard(row)
                    else:
                        answers[row].append(token)
                if not unfinished:
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
        return [tuple(answer) for answer in answers]

    def force(self, prompt: Sequence[int], answer: Sequence[int]) -> Forced:
        """Score a given answer."""
        begin = time.perf_counter()
        _, cache = self._append(prompt, None, 0, **self._last_logits)
        seconds = time.perf_counter() - begin
        logits, _ = self._append(answer[:-1], cache, len(prompt))
        return Forced(logits=logits.float().numpy(), precisions=(self._bits,) * len(answer), prefill_seconds=seconds)


def _transformers(checkpoint: ReferenceCheckpoint, threads: int) -> Reference:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from pmpd.exporter.source.reference import corrected, load_model

    disable_progress_bar()  # transformers 5 shows one for loading; the progress here is ours
    torch.set_num_threads(threads)
    if checkpoint.path.is_file():
        model = load_model(_open_file(checkpoint.path))
    else:
        config = corrected(AutoConfig.from_pretrained(checkpoint.path, local_files_only=True))
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=config, dtype=torch.float32, local_files_only=True
        )
    return Reference(model.eval(), bits=checkpoint.bits, last_logits={"logits_to_keep": 1})


def _optimum(checkpoint: ReferenceCheckpoint, threads: int) -> Reference:
    import onnxruntime

    if checkpoint.path.is_file():
        raise PmpdError(f"optimum reads no GGUF file ({checkpoint.path}): take --reference-backend transformers")
    try:
        from optimum.onnxruntime import ORTModelForCausalLM
    except (ImportError, RuntimeError) as error:  # RuntimeError: a module of optimum that is imported on first use
        if getattr(error, "name", None) in ("optimum", "optimum.onnxruntime"):
            raise MissingExtraError("optimum-onnx", "baseline") from None
        raise PmpdError(
            f"optimum-onnx cannot be imported with transformers {version('transformers')} ({one_line(error)}): install "
            "both in a new environment with `pip install 'pmpd[eval,baseline]'`, or "
            "take --reference-backend transformers"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(
        checkpoint.path, export=True, session_options=options, local_files_only=True
    )
    return Reference(model, bits=checkpoint.bits)


BACKENDS: Mapping[str, Callable[[ReferenceCheckpoint, int], Reference]] = {
    "transformers": _transformers,
    "optimum": _optimum,
}
