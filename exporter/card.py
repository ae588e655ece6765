"""The bundle's README.md: what it is, where it comes from, how to run it."""

from __future__ import annotations

from pmpd.exporter.verify import Agreement
from pmpd.runtime.manifest import Manifest

__all__ = ["model_card"]


def model_card(manifest: Manifest, results: dict[str, Agreement], *, name: str) -> str:
    """Return the text of a bundle's README.md."""
    architecture, source = manifest.architecture, manifest.source
    bits = ", ".join(map(str, manifest.precisions))
    front = f"license: {source.license}\n" if source.license else ""
    files = "\n".join(f"| {file} | {entry.size / 1e6:.2f} MB |" for file, entry in sorted(manifest.files.items()))
    checks = "\n".join(f"- {check}: {agreement}" for check, agreement in results.items())
    return f"""---
{front}base_model: {source.model}
library_name: pmpd
tags: [onnx, pmpd]
---

# {name}

`{source.model}`{f" at revision `{source.revision}`" if source.revision else ""}, quantized to nested bit-planes for
progressive mixed-precision decoding (PMPD, ICLR 2025) by {manifest.producer}.

{architecture.family}, {architecture.parameters / 1e6:,.1f} M parameters, {architecture.layers} layers, context
{manifest.context_length}. Decodes at {bits} bits from one set of weights of {manifest.parent_precision} bit-planes;
prefills at {manifest.prefill_precision} bits. Default schedule: `{manifest.schedule}`. Licence of the weights:
{source.license or "see the source model"}.

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
for token in generator.stream(tokenizer.encode("Once upon a time"), max_new_tokens=100, schedule="{manifest.schedule}"):
    print(token.text, end="", flush=True)
```

The graphs run in stock ONNX Runtime: the operator `pmpd::BitplaneMatMul` carries its definition in standard operators.

## What was checked at export

{checks}

## Files

| file | size |
|---|---|
{files}
"""
