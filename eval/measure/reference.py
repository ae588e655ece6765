"""The floating-point model that everything is compared with: the source checkpoint, unquantized, in float32."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmpd.eval.measure.models import ROWS, Answer, Forced
from pmpd.runtime import Bundle
from pmpd.runtime.errors import MissingExtraError, PmpdError, one_line
from pmpd.runtime.format.bundle import sha256_of

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

    @property
    def digest(self) -> str:
        """What it is known by: where it is, and the sizes and times of its files."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr([str(self.path.resolve()), stats]).encode()).hexdigest()

    def weight_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each of its files with weights, by name. All of them are read."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        return {file.name: sha256_of(file) for file in files}

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
    """A causal language model with the forward call of transformers, decoding greedily.

    Args:
        model: called with `input_ids`, `attention_mask` and `past_key_values`.
        bits: bits of the stored weights, reported as the precision.
        last_logits: arguments that limit the logits to the last position, where the model knows how.
        together: whether it takes prompts of several lengths side by side.

    Attributes:
        network: the model.
    """

    def __init__(
        self, model: Any, *, bits: int, last_logits: Mapping[str, Any] | None = None, together: bool = False
    ) -> None:
        self.network, self._bits = model, bits
        self._last_logits, self._together = last_logits or {}, together

    def _append(self, ids: Sequence[int], cache: Any, length: int, **options: Any) -> tuple[Any, Any]:
        """Run tokens after the `length` that the cache holds; return logits ``[positions, V]`` and the cache."""
        import torch

        with torch.inference_mode():
            output = self.network(
                input_ids=torch.tensor([list(ids)]),
                attention_mask=torch.ones(1, length + len(ids), dtype=torch.int64),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return output.logits[0], output.past_key_values

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[Answer]:
        """Answer prompts greedily: side by side where the backend can, so that weights are read once for all.

        Shorter prompts are then padded on the left, which rounds sums in another order than one prompt alone does.
        """
        if self._together and len(prompts) > 1:
            texts = self._side_by_side(prompts, max_new_tokens, stop_ids)
        else:
            texts = [self._alone(prompt, max_new_tokens, stop_ids) for prompt in prompts]
        return [Answer(ids=tuple(ids), precisions=(self._bits,) * len(ids)) for ids in texts]

    def _alone(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        ids: list[int] = []
        logits, cache = self._append(prompt, None, 0, **self._last_logits)
        while (token := int(logits[-1].argmax())) not in stop_ids:
            ids.append(token)
            if len(ids) == max_new_tokens:
                break
            logits, cache = self._append([token], cache, len(prompt) + len(ids) - 1)
        return ids

    def _side_by_side(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        answers = [list[int]() for _ in prompts]
        unfinished, cache = set(range(len(prompts))), None
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = self.network(
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
        return answers

    def force(self, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Forced]:
        """Score a given answer of one token or more."""
        logits, cache = self._append(prompt, None, 0, **self._last_logits)
        yield Forced(start=0, logits=logits[-1:].float().numpy(), precision=self._bits)
        for start in range(0, len(answer) - 1, ROWS):
            part = answer[start : min(start + ROWS, len(answer) - 1)]
            logits, cache = self._append(part, cache, len(prompt) + start)
            yield Forced(start=start + 1, logits=logits.float().numpy(), precision=self._bits)


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
    return Reference(model.eval(), bits=checkpoint.bits, last_logits={"logits_to_keep": 1}, together=True)


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
