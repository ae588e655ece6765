"""The peers by name, how a user asks for them, and what their models are made of: weights, or a bundle's shape."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.manifest import Manifest

__all__ = ["IMPORTANCE", "PEERS", "ModelShape", "Peer", "parse_peers", "weights_name"]

_FOLDER = Path(__file__).parent
PEERS = {"llama.cpp": _FOLDER / "llama_cpp.py", "onnxruntime-genai": _FOLDER / "onnxruntime_genai.py"}
FAMILIES = ("llama", "phi")
IMPORTANCE = "_imatrix"
"""Ends the name of a variant of llama.cpp that is quantized with an importance matrix."""


@dataclass(frozen=True)
class Peer:
    """One variant of a peer: ``llama.cpp`` and ``Q4_0``."""

    name: str
    variant: str

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.name} {self.variant}"

    @property
    def nominal_bits(self) -> int | None:
        """The bits that its name claims: 4 of Q4_0, 2 of int2g128."""
        digits = re.search(r"\d+", self.variant)
        return int(digits[0]) if digits else None


def parse_peers(specs: tuple[str, ...]) -> tuple[Peer, ...]:
    """Read peers as users ask for them, ``llama.cpp:Q4_0,Q3_K_M``.

    Raises:
        PmpdError: no such peer, or no variant given.
    """
    peers: dict[Peer, None] = {}
    for spec in specs:
        name, _, variants = spec.partition(":")
        if name not in PEERS:
            raise PmpdError(unknown_choice("peer", name, PEERS))
        named = [variant.strip() for variant in variants.split(",")]
        # A variant becomes a file name.
        if bad := [variant for variant in named if not re.fullmatch(r"\w+", variant)]:
            raise PmpdError(f"peer {spec!r}: {bad[0]!r} is no variant: give {name}:VARIANT,… (Q4_0, int4g32, …)")
        if name != "llama.cpp" and (bad := [variant for variant in named if variant.endswith(IMPORTANCE)]):
            raise PmpdError(
                f"peer {spec!r}: {bad[0]!r}: only llama.cpp takes an importance matrix: leave {IMPORTANCE} out"
            )
        peers.update(dict.fromkeys(Peer(name, variant) for variant in named))
    return tuple(peers)


def weights_name(path: Path) -> str:
    """Return a short name for a folder of models made of given weights: a checkpoint folder, or a GGUF file.

    The name changes with the files' names, sizes and times.

    Raises:
        PmpdError: it is neither.
    """
    files = [path] if path.suffix == ".gguf" else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    try:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        stats = []
    if not stats or (path.is_dir() and len(stats) < 2):
        raise PmpdError(f"peers' weights {path}: give a checkpoint folder with safetensors, or a .gguf file")
    return f"{path.resolve().name.removesuffix('.gguf')}-{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a random model needs to be as large as the bundle's."""

    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab_size: int
    context_length: int

    @classmethod
    def of(cls, manifest: Manifest) -> ModelShape:
        """Read it off a manifest.

        Raises:
            PmpdError: a family that no peer's random model is known for.
        """
        a = manifest.architecture
        if a.family not in FAMILIES:
            raise PmpdError(f"peers cannot be compared: {unknown_choice('family', a.family, FAMILIES)}")
        rows = {tensor.layer: tensor.shape[1] for tensor in manifest.tensors if tensor.role == "planes"}
        gated = rows.get("model.layers.0.mlp.gate_up_proj")  # two matrices, stacked
        intermediate_size = gated // 2 if gated else rows["model.layers.0.mlp.fc1_proj"]
        pairs = max(tensor.shape[1] for tensor in manifest.tensors if tensor.role == "rotary")
        return cls(
            family=a.family,
            layers=a.layers,
            hidden_size=a.hidden_size,
            intermediate_size=intermediate_size,
            attention_heads=a.attention_heads,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            rotary_dim=2 * pairs,
            vocab_size=a.vocab_size,
            context_length=manifest.context_length,
        )

    @property
    def digest(self) -> str:
        """A short name for a folder of models of this shape."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.family}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
