"""A peer: llama.cpp through the low-level API of llama-cpp-python, on given weights or random ones of a given shape.

Stand-alone (see `serve`): needs llama-cpp-python, gguf and numpy. Timed as llama-bench does: the prompt in one batch,
then single given tokens, without sampling; every other setting, also of the quantizer, is the library's default.
"""

from __future__ import annotations

import ctypes
import json
import runpy
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["LlamaCpp", "load", "make"]

_SOURCE = Path(__file__).with_name("gguf_source.py")
IMPORTANCE = "_imatrix"  # as in `peers.py`


class LlamaCpp:
    """A GGUF model, loaded once, with a context for one sequence."""

    def __init__(self, path: Path, *, threads: int, positions: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        _silence(llama_cpp)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = positions, threads, threads
        params.n_batch = max(params.n_batch, positions)
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {path.name}: delete it, to have it made again")
        self.facts = {
            "version": f"llama-cpp-python {version('llama-cpp-python')}",
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
            "model_bytes": path.stat().st_size,
            **json.loads(path.with_suffix(".json").read_text(encoding="utf-8")),
        }

    def run(self, *, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Time a prompt and single tokens after it, in seconds."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return {"prefill_seconds": self._decode(prompt), "seconds": [self._decode([token]) for token in tokens]}

    def logits(self, *, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Any]:
        """Yield the logits ``[V]`` after each token of `answer` but the last, all computed in one batch."""
        import numpy as np

        api, ids = self._api, [*prompt, *answer[:-1]]
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= len(prompt)
        code = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")
        for i in range(len(prompt), len(ids)):
            row = api.llama_get_logits_ith(self._context, i)
            yield np.ctypeslib.as_array(row, (self.facts["vocab_size"],))

    def _decode(self, ids: Sequence[int]) -> float:
        array = (self._api.llama_token * len(ids))(*ids)
        begin = time.perf_counter()
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(ids)))
        self._api.llama_synchronize(self._context)
        seconds = time.perf_counter() - begin
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")
        return seconds


def load(options: Mapping[str, Any]) -> LlamaCpp:
    """Load one variant of the model that `make` made."""
    return LlamaCpp(_file(options, options["variant"]), threads=options["threads"], positions=options["positions"])


def make(options: Mapping[str, Any]) -> None:
    """Make the missing variants: an F16 model, and from it each quantized one, named as llama.cpp names them.

    With ``_imatrix`` behind its name a variant is quantized with the importance matrix of ``options["importance"]``
    (`importance.py`). Beside each file lies another with what a step reads of it.
    """
    import llama_cpp

    _silence(llama_cpp)
    kinds = {
        variant: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.removesuffix(IMPORTANCE)}", None)
        for variant in options["variants"]
    }
    if unknown := [variant for variant, kind in kinds.items() if kind is None]:
        raise ValueError(f"llama.cpp has no quantization {unknown[0]}: take Q4_0, Q4_K_M, Q3_K_M, Q2_K, …")
    if any(variant.endswith(IMPORTANCE) for variant in kinds) and not hasattr(llama_cpp, "llama_model_imatrix_data"):
        raise ValueError("this llama-cpp-python takes no importance matrix: install a newer one (0.3.36 does)")
    source = runpy.run_path(str(_SOURCE))
    if any(not _file(options, variant).exists() for variant in kinds):
        _make_files(options, kinds, llama_cpp, source["write"])
    for variant in kinds:
        notes = _file(options, variant).with_suffix(".json")
        if not notes.exists():
            notes.write_text(json.dumps(source["describe"](_file(options, variant))), encoding="utf-8")


def _make_files(options: Mapping[str, Any], kinds: Mapping[str, Any], api: Any, write: Any) -> None:
    """Write the F16 model and quantize it; it is kept only if it is asked for."""
    source = _file(options, "F16")
    kept = source.exists() or "F16" in kinds
    if not source.exists():
        draft = source.with_suffix(".partial")
        write(draft, options)
        draft.rename(source)
    for variant, kind in kinds.items():
        target = _file(options, variant)
        if target.exists():
            continue
        params = api.llama_model_quantize_default_params()
        params.ftype, params.nthread = kind, options["threads"]
        if variant.endswith(IMPORTANCE):
            matrix = _importance(api, Path(options["importance"]), source)
            params.imatrix = ctypes.cast(matrix, ctypes.POINTER(api.llama_model_imatrix_data))
        draft = target.with_suffix(".partial")
        if api.llama_model_quantize(str(source).encode(), str(draft).encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantize to {variant}")
        draft.rename(target)
    if not kept:
        source.unlink()


def _importance(api: Any, file: Path, source: Path) -> Any:
    """Return an importance matrix as llama.cpp takes it: an array whose last element has no name."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{architecture}.block_count"].contents()
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), layers)
    entry = api.llama_model_imatrix_data
    with np.load(file) as means:
        known = [(names.get_name(name, try_suffixes=(".weight",)), means[name]) for name in means.files]
    entries = [
        entry(name.encode(), mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), mean.size) for name, mean in known
    ]
    array = (entry * (len(entries) + 1))(*entries)
    array.kept = known
    return array


def _silence(api: Any) -> None:
    """Turn off the log; the callback must outlive the library's use of it."""
    api.pmpd_log = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(api.pmpd_log, None)


def _file(options: Mapping[str, Any], variant: str) -> Path:
    return Path(options["folder"]) / f"{variant}.gguf"
