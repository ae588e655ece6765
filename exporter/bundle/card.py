"""The bundle's README.md: what it is, where it comes from, how to run it."""

from __future__ import annotations

from pmpd.runtime.console.output import markdown_table
from pmpd.runtime.format.manifest import Manifest
from pmpd.runtime.format.precision import describe_mix

__all__ = ["CARD", "model_card", "skeleton_card"]

CARD = "README.md"


def model_card(manifest: Manifest, *, name: str) -> str:
    """Return the text of a bundle's README.md, which says what the manifest's verification measured."""
    architecture, source = manifest.architecture, manifest.source
    bits = ", ".join(map(str, manifest.precisions))
    size = f"{architecture.parameters / 1e6:,.1f} M parameters"
    head = manifest.configuration["head_precision"]
    # The planes of an embedding of its own; a tied one has none.
    planes = (t.shape[0] for t in manifest.tensors if t.role == "embedding" and t.dtype == "uint8")
    stored = next(planes, None)
    tables = f"{head} bits, embedding " + ("tied to it" if stored is None else f"{stored} bits")
    phases = f"decodes at {bits} bits, prefills at {manifest.prefill_precision}"
    mixes = "".join(f"| planes at {name} bits | {describe_mix(mix)} |\n" for name, mix in manifest.mixes.items())
    front = f"license: {source.license}\n" if source.license else ""
    files = "\n".join(f"| {file} | {entry.size:,} |" for file, entry in sorted(manifest.files.items()))
    checks = manifest.verification
    verification = "\n".join(f"- {check}: {result['summary']}" for check, result in checks.items())
    warnings = "".join(f"\n**{result['warning']}**\n" for result in checks.values() if "warning" in result)
    if not manifest.verified:
        verification = "**Nothing: it was exported with `--no-verify`.**"
    quality = "**Not measured: it was exported with `--no-verify`.**"
    if manifest.quality is not None:
        quality = f"On {manifest.quality.heading}:\n\n{markdown_table(manifest.quality.rows())}"
    kernels = (
        f"{', '.join(manifest.kernels)} ({manifest.accuracy})" if manifest.kernels else "none: portable graphs, slow"
    )
    revision = f" at revision `{source.revision}`" if source.revision else ""
    return f"""---
{front}base_model: {source.model}
library_name: pmpd
tags: [onnx, pmpd]
---

# {name}

`{source.model}`{revision}, quantized to nested bit-planes for progressive mixed-precision decoding (PMPD, ICLR 2025).
{warnings}
| | |
|---|---|
| architecture | {architecture.family}, {size}, {architecture.layers} layers |
| context | {manifest.context_length} tokens |
| precisions | {phases}, from {manifest.parent_precision} bit-planes |
{mixes}| output layer | {tables} |
| schedule | `{manifest.schedule}`, unless another was found since: `pmpd-run {name} --info` |
| kernels | {kernels} |
| licence of the weights | {source.license or "see the source model"} |
| made by | {manifest.producer} |

## Run it

```
pip install 'pmpd[cpu,text]'
pmpd-run {name} -p "Once upon a time" --show-precision
```

```python
from pmpd.runtime import Bundle, Generator, Tokenizer

bundle = Bundle.open("{name}")
tokenizer = Tokenizer.from_bundle(bundle)
generator = Generator(bundle, tokenizer=tokenizer)
for token in generator.stream(tokenizer.encode("Once upon a time"), max_new_tokens=100):
    print(token.text, end="", flush=True)
```

The graphs run in stock ONNX Runtime: the operator `pmpd::BitplaneMatMul` carries its definition in standard operators.
Kernels are native code that the commands above load and run; `pmpd-run --no-kernels` and `Generator(kernels=False)` do
without.

## What each precision costs

{quality}

## What was checked at export

{verification}

## Files

| file | bytes |
|---|---|
{files}
"""


def skeleton_card(manifest: Manifest, *, name: str) -> str:
    """Return the text of the README.md of a bundle without weights."""
    architecture = manifest.architecture
    shape = f"{architecture.layers} layers, {architecture.parameters / 1e6:,.1f} M parameters"
    bits = ", ".join(map(str, manifest.precisions))
    size = max(tensor.offset + tensor.length for tensor in manifest.tensors)
    return f"""# {name}

The skeleton of a PMPD bundle of `{manifest.source.model}` ({architecture.family}, {shape}) that decodes at {bits} bits,
made by {manifest.producer}: the graphs and the tensor table of an export, for tools that study shapes. Its weights
({size:,} bytes) are not here, so it does not run. For a bundle that does, export the model without `--skeleton`.
"""
