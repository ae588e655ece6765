"""What a model's configuration decides of its bundle before any weight is read: graphs and tensor table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import onnx_ir as ir

from pmpd.exporter.arch import Decoder, Family, read_family
from pmpd.exporter.bundle.plan import WeightPlan, external_tensor, plan_weights
from pmpd.exporter.config import DEFAULT_EMBEDDING_PRECISION, ResolvedConfig
from pmpd.exporter.graph.logits import BITPLANE_LOGITS
from pmpd.exporter.graph.operators import BITPLANE_MATMUL
from pmpd.exporter.nn import BitplaneEmbedding, BitplaneLinear, BitplaneLogits, LinearFactory, apart
from pmpd.exporter.onnx_model import Phase, build_graph
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of
from pmpd.runtime.format.manifest import Architecture, FileEntry, Graph, KvContract, Manifest, Source
from pmpd.runtime.format.precision import planes_read

__all__ = ["Outline", "coarse_bits", "file_entry"]

# Coarse to fine pays for vocabularies and output layers of at least this size, and from this precision on; see README.
LEAST_WORDS, LEAST_WEIGHTS, LEAST_HEAD = 32_000, 1 << 24, 6
COARSE = 4
# Products of their own in bundles with mixes: few weights, of which each matters more than those they are merged with.
APART = ("v_proj",)


@dataclass(frozen=True)
class Outline:
    """A bundle as far as its model's configuration decides it. Use `Outline.of`.

    Attributes:
        config: the configuration of the export.
        source: where the model comes from.
        family: its architecture.
        network: its network at the highest precision; it holds no weights.
        plan: the layout of the weight file.
        mixes: as in the manifest; none until layers are quantized.
    """

    config: ResolvedConfig
    source: Source
    family: Family
    network: Decoder
    plan: WeightPlan
    mixes: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ResolvedConfig, source: Source, document: Mapping[str, Any]) -> Self:
        """Outline the bundle of a model with a `config.json`.

        Raises:
            PmpdError: an architecture or an option of one that cannot be exported, or an option that it has no use for.
        """
        family = read_family(document, context_length=config.context_length)
        if family.shape.tied_embeddings and config.embedding_precision is not None:
            raise PmpdError(
                f"embedding precision {config.embedding_precision}: this model's embedding is tied to its output layer "
                "and stored once: use --head-precision"
            )
        network = _network(config, family, config.planes[0], coarse=coarse_bits(config, family))
        return cls(config, source, family, network, plan_weights(network, config.planes, config.parent))

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return sum(layer.module.out_features * layer.module.in_features for layer in self.plan.layers)

    def describe(self) -> list[str]:
        """Return the plan in lines for a person."""
        config, shape, plan = self.config, self.family.shape, self.plan
        graph = self.model(replace(self.graphs[1], precision=config.planes[0])).graph  # mixes have the same nodes
        last = f"model/layers.{shape.layers - 1}/"
        a_layer = sum((node.name or "").startswith(last) for node in graph)
        products = sum(node.op_type in (BITPLANE_MATMUL, BITPLANE_LOGITS) for node in graph)
        planes, codebooks, table = map(plan.nbytes, ("planes", "codebook", "embedding"))
        others = plan.size - planes - codebooks - table
        tied = plan.embedding is None
        at = "" if plan.embedding is None else f", embedding at {plan.embedding.parent}"
        size = "" if tied else f"embedding {table / 1e6:,.1f}, "
        note = " (the embedding is tied: read from the head)" if tied else ""
        return [
            f"model     {config.model}: {self.family.model_type}, {self.parameters / 1e6:,.1f} M parameters, "
            f"{shape.layers} layers, context {shape.context_length}",
            *self.family.describe(),
            f"bundle    {config.output}: {'/'.join(map(str, config.precisions))} bits from {config.parent} planes, "
            f"prefill at {config.prefill}, head at {config.head_precision}{at}, "
            f"schedule {config.schedule}",
            f"weights   {plan.size / 1e6:,.1f} MB: planes {planes / 1e6:,.1f}, codebooks {codebooks / 1e6:,.1f}, "
            f"{size}others {others / 1e6:,.1f}{note}",
            f"graphs    {len(self.graphs)} of {len(graph)} nodes, {a_layer} a layer, {products} {BITPLANE_MATMUL}",
        ]

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The bundle's graphs: prefill, then decode from high to low."""
        return (
            Graph(file="prefill.onnx", phase="prefill", precision=self.config.prefill),
            *(Graph(file=f"decode-{p}.onnx", phase="decode", precision=p) for p in self.config.precisions),
        )

    def model(self, graph: Graph) -> ir.Model:
        """Build one of `graphs`; its weights are references into the weight file, which need not exist."""
        phase: Phase = "prefill" if graph.phase == "prefill" else "decode"
        # A prompt's graph computes the output layer once: it reads all of it.
        coarse = coarse_bits(self.config, self.family) if phase == "decode" else None
        network = _network(self.config, self.family, self.config.planes[0], coarse=coarse)
        read = {
            layer.name: planes_read(self.mixes, graph.precision, layer.name) if layer.module.nested else layer.parent
            for layer in self.plan.linears
        }
        for name, module in network.named_modules():
            if isinstance(module, BitplaneLinear) and module.nested:
                module.read(read[name])
        model = build_graph(network, phase=phase, producer=_producer())
        for name, value in model.graph.initializers.items():
            if name in self.plan.tensors:
                tensor = self.plan.tensors[name]
                value.const_value = external_tensor(tensor, planes=read.get(tensor.layer or "", 0))
        return model

    def write_graphs(self, folder: Path) -> None:
        """Write `graphs` into a folder."""
        for graph in self.graphs:
            (folder / graph.file).write_bytes(ir.to_proto(self.model(graph)).SerializeToString())

    def manifest(
        self, folder: Path, files: Iterable[Path], *, kernels: Mapping[str, str] | None = None, skeleton: bool = False
    ) -> Manifest:
        """Return the manifest of a bundle with some files in `folder`, which are hashed.

        Args:
            folder: the bundle's.
            files: those to list, without the manifest.
            kernels: paths of operator libraries within the bundle, by target.
            skeleton: whether the weights are left out.
        """
        config, shape = self.config, self.family.shape
        return Manifest(
            producer=_producer(),
            source=self.source,
            architecture=Architecture(
                family=self.family.model_type,
                layers=shape.layers,
                hidden_size=shape.hidden_size,
                attention_heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head.size,
                vocab_size=shape.vocab_size,
                parameters=self.parameters,
            ),
            context_length=shape.context_length,
            precisions=config.precisions,
            parent_precision=config.parent,
            prefill_precision=config.prefill,
            schedules={"default": config.schedule},
            default_schedule="default",
            kv_cache=KvContract(layers=shape.layers, heads=shape.kv_heads, head_dim=shape.head.slots, dtype="float16"),
            graphs=self.graphs,
            tensors=tuple(self.plan.tensors.values()),
            files={file.relative_to(folder).as_posix(): file_entry(file) for file in files},
            configuration=config.to_json(),
            accuracy=config.accuracy,
            kernels=dict(kernels or {}),
            skeleton=skeleton,
            mixes=self.mixes,
        )


def file_entry(file: Path) -> FileEntry:
    """Return what a manifest says of a file, which is read to the end."""
    return FileEntry(size=file.stat().st_size, sha256=sha256_of(file))


def coarse_bits(config: ResolvedConfig, family: Family) -> int | None:
    """Return how many bits of the output layer decoding reads of all rows; None: it reads all bits of all rows."""
    if config.coarse_precision is not None:
        return config.coarse_precision or None
    words, width = family.shape.vocab_size, family.shape.hidden_size
    large = words >= LEAST_WORDS and words * width >= LEAST_WEIGHTS
    return COARSE if large and config.head_precision >= LEAST_HEAD and config.groups == 1 else None


def _network(config: ResolvedConfig, family: Family, precision: int, *, coarse: int | None) -> Decoder:
    merged = partial(BitplaneLinear, precision=precision, groups=config.groups)
    linear: LinearFactory = apart(merged, APART) if config.mixes else merged
    head: LinearFactory = partial(BitplaneLinear, precision=config.head_precision, groups=config.groups, nested=False)
    if coarse is not None:
        head = partial(BitplaneLogits, precision=config.head_precision, coarse=coarse)
    bits = DEFAULT_EMBEDDING_PRECISION if config.embedding_precision is None else config.embedding_precision
    return family.decoder(linear, head, partial(BitplaneEmbedding, precision=bits, groups=config.groups))


def _producer() -> str:
    return f"pmpd {version('pmpd')}"
