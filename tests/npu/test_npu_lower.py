"""Lowering: what an accelerator moves and computes is what the graph references, by formulas of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY_MODELS

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.exporter.source.models import shipped_models
from pmpd.npu_backend import Model, lower, read_hardware
from pmpd.npu_backend.machine.instructions import Load, Matrix, Program, Special, Store
from pmpd.npu_backend.program.graph import read_graph
from pmpd.runtime import Bundle, BundleError, PmpdError

NPU = read_hardware("npu-4k")
KINDS = ("softmax", "norm", "activation", "rotary", "elementwise")
STEP = int(NPU.controller.length_granularity)


@dataclass(frozen=True)
class Reference:
    """What an ONNX file says of its weights, read without the package."""

    path: Path

    @cached_property
    def graph(self) -> Any:
        return onnx.load(str(self.path), load_external_data=False).graph

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Bytes of ``weights.bin`` by initializer."""
        tensors = [tensor for tensor in self.graph.initializer if tensor.external_data]
        return {
            tensor.name: next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            for tensor in tensors
        }

    @cached_property
    def tables(self) -> dict[str, int]:
        """Bytes of a row of the cosines and sines, which are looked up, not streamed."""
        names = [name for node in self.rotations for name in self.rotary_tables(node)]
        rows = {tensor.name: tensor.dims[0] for tensor in self.graph.initializer if tensor.dims}
        return {name: self.lengths[name] // rows[name] for name in names}

    @property
    def not_streamed(self) -> set[str]:
        """Weights that are looked up, and those of an output layer for doing less than the whole product."""
        bounds = (name for node in self.nodes("BitplaneLogits") for name in node.input[3:7])
        return {*self.tables, *bounds, *(() if self.is_tied else self.embedding_tables)}

    @property
    def embedding_tables(self) -> list[str]:
        """The planes and the codebook that rows of the embedding are read from."""
        (gather,) = self.nodes("BitplaneGather")
        return list(gather.input[1:])

    @property
    def is_tied(self) -> bool:
        """Whether these are the output layer's."""
        return self.embedding_tables == list(self.product_nodes[-1].input[1:3])

    @cached_property
    def embedding(self) -> int:
        """Bytes of a row of the embedding, of its planes and codebook."""
        planes, codebook = self.embedding_tables
        rows = next(tensor.dims[1] for tensor in self.graph.initializer if tensor.name == planes)
        return (self.lengths[planes] + self.lengths[codebook]) // rows

    def nodes(self, op_type: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type == op_type]

    @property
    def rotations(self) -> list[Any]:
        """The nodes that rotate queries and keys."""
        return [*self.nodes("GroupQueryAttention"), *self.nodes("RotaryEmbedding")]

    def rotary_tables(self, node: Any) -> list[str]:
        """The cosines and sines that such a node reads a row of for each token."""
        return list(node.input[5:7] if node.op_type == "GroupQueryAttention" else node.input[2:4])

    @property
    def attention_limits(self) -> list[tuple[float, float]]:
        """The window of every layer in tokens, or infinity, and the softcap of its scores, or 0."""
        limits = []
        for node in self.nodes("GroupQueryAttention"):
            attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            limits.append((attributes.get("window") or inf, attributes.get("softcap", 0.0)))
        return limits

    @property
    def product_nodes(self) -> list[Any]:
        """The products; the output layer comes last."""
        return [*self.nodes("BitplaneMatMul"), *self.nodes("BitplaneLogits")]

    def by_node(self, *positions: int) -> dict[str, int]:
        """Bytes that a node streams: of all its inputs, or of those at some positions."""
        found = {}
        for node in self.graph.node:
            if node.op_type == "BitplaneGather":
                continue
            names = [name for i, name in enumerate(node.input) if not positions or i in positions]
            nbytes = sum(self.lengths.get(name, 0) for name in names if name not in self.not_streamed)
            if nbytes:
                found[node.name] = nbytes
        return found

    @cached_property
    def products(self) -> dict[str, tuple[int, int]]:
        """``(N, K)`` of every product by node; the output layer comes last."""
        dims = {tensor.name: tensor.dims for tensor in self.graph.initializer}
        return {
            node.name: (dims[node.input[1]][1], next(entry.i for entry in node.attribute if entry.name == "K"))
            for node in self.product_nodes
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skeletons of every tiny model that transformers has; `_export` adds those that are shipped."""
    folder = tmp_path_factory.mktemp("skeletons")
    for name, model in TINY_MODELS.items():
        try:
            config = model.config()
        except pytest.skip.Exception:  # only the tests of that model are skipped
            continue
        (folder / "config" / name).mkdir(parents=True)
        (folder / "config" / name / "config.json").write_text(json.dumps(config))
        _export(folder / "config" / name, folder / name)
    return folder


def _export(model: str | Path, output: Path) -> Path:
    if not output.exists():
        if model in TINY_MODELS:
            TINY_MODELS[str(model)].config()  # it skips the test: transformers has no such model
        export_skeleton(ExportConfig(model=str(model), output=output, precisions=(4, 2)))
    return output


# One of each family and size of graph; the others are slow.
SHIPPED = ("gemma-3-1b", "llama3-8b", "phi-1", "stablelm-zephyr-3b")


@pytest.mark.parametrize(
    "name",
    [
        *TINY_MODELS,
        *(pytest.param(name, marks=[] if name in SHIPPED else pytest.mark.slow) for name in shipped_models()),
    ],
)
def test_bytes_are_those_that_the_graph_references(name: str, folder: Path) -> None:
    _check_bytes(_export(name, folder / name))


def test_bytes_of_a_real_bundle(demo_bundle: Path) -> None:
    _check_bytes(demo_bundle)
    manifest = Bundle.open(demo_bundle).manifest
    for graph in manifest.graphs:
        assert sum(Reference(demo_bundle / graph.file).lengths.values()) < manifest.files["weights.bin"].size


def _check_bytes(path: Path) -> None:
    for graph in Bundle.open(path, skeleton=True).manifest.graphs:
        reference, past = Reference(path / graph.file), 17
        program = lower(read_graph(path / graph.file), NPU, tokens=1, past=past)
        read = {each.node: each.nbytes("planes", "codebooks", "vectors") for each in program.operators}
        assert len(read) == len(program.operators)
        rotary = {
            node.name: sum(reference.tables[name] for name in reference.rotary_tables(node))
            for node in reference.rotations
        }
        expected = reference.by_node() | rotary
        assert {node: nbytes for node, nbytes in read.items() if nbytes} == expected
        # Rows of an embedding apart no weight belongs to two nodes: the sum is that over what the file references.
        streamed = sum(nbytes for name, nbytes in reference.lengths.items() if name not in reference.not_streamed)
        assert program.nbytes("planes", "codebooks", "vectors") == streamed + sum(rotary.values())
        assert program.nbytes("planes") == sum(_of_products(reference, 1).values())
        assert program.nbytes("codebooks") == sum(_of_products(reference, 2).values())
        assert program.nbytes("embedding") == reference.embedding
        assert program.nbytes("dense", "activations") == 0
        assert program.nbytes("logits") == list(reference.products.values())[-1][0]  # int8, one row


def _of_products(reference: Reference, position: int) -> dict[str, int]:
    return {node: nbytes for node, nbytes in reference.by_node(position).items() if node in reference.products}


@pytest.mark.parametrize("name", [*TINY_MODELS, "vicuna-7b"])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 16), (1, 33), (7, 0), (20, 5)])
def test_operations_and_cache(name: str, tokens: int, past: int, folder: Path) -> None:
    path = _export(name, folder / name)
    model, manifest = Model.open(path), Bundle.open(path, skeleton=True).manifest
    shape, dim = manifest.architecture, manifest.kv_cache.head_dim  # with the zeros that fill up a head
    graph = model.decode[2] if tokens == 1 else model.prefill
    program = lower(graph, NPU, tokens=tokens, past=past)
    products = list(Reference(graph.path).products.values())
    cached = ceil(past / STEP) * STEP
    limits = Reference(graph.path).attention_limits
    seen = sum(min(cached + token + 1, window) for window, _ in limits for token in range(tokens))  # by all tokens
    of_layers = tokens * sum(n * k for n, k in products[:-1])
    head = products[-1][0] * products[-1][1]  # of the last token only
    attention = 2 * shape.attention_heads * dim * seen
    assert sum(each.macs for each in program.operators) == of_layers + head + attention
    steps = [step for each in program.operators for step in each.instructions]
    position = 2 * shape.kv_heads * dim  # int8
    assert _moved(steps, Load) == sum(min(cached, window - 1) for window, _ in limits) * position
    assert _moved(steps, Store) == tokens * shape.layers * position
    elements = {name: sum(s.elements for s in steps if isinstance(s, Special) and s.function == name) for name in KINDS}
    assert elements["softmax"] == shape.attention_heads * seen
    (down,) = {k for node, (_, k) in Reference(graph.path).products.items() if "down_proj" in node or "fc2" in node}
    reference = Reference(graph.path)
    capped = sum(node.op_type == "Tanh" for node in reference.graph.node) * products[-1][0]  # the last token's logits
    # A softcap is for all layers' scores or for none.
    capped += any(softcap for _, softcap in limits) * elements["softmax"]
    assert elements["activation"] == tokens * shape.layers * down + capped
    dims = {tensor.name: tensor.dims for tensor in reference.graph.initializer}
    rotated = 0  # elements of a token
    for node in reference.rotations:
        numbers = {entry.name: entry.i for entry in node.attribute}
        pairs = dims[reference.rotary_tables(node)[0]][1]
        rotated += (numbers["num_heads"] + numbers.get("kv_num_heads", 0)) * 2 * pairs
    assert elements["rotary"] == tokens * rotated
    norms = [node for node in reference.graph.node if "Normalization" in node.op_type]
    wide = dict.fromkeys(("q_layernorm", "q_norm", "query_layernorm"), shape.attention_heads * dim)
    wide |= dict.fromkeys(("k_layernorm", "k_norm", "key_layernorm"), shape.kv_heads * dim)
    widths = [next((wide[key] for key in wide if key in node.name), shape.hidden_size) for node in norms]
    assert elements["norm"] == tokens * sum(widths)


def _moved(steps: list[Any], kind: type) -> Any:
    return sum(step.nbytes for step in steps if type(step) is kind and step.data == "kv_cache")


def test_float16_is_twice_the_elements(folder: Path) -> None:
    graph = Model.open(folder / "phi").decode[4]
    quantized, fp16 = (lower(graph, NPU, tokens=1, past=30, fp16=wide) for wide in (False, True))
    products = Reference(graph.path).products.values()
    assert fp16.nbytes("dense") == 2 * sum(n * k for n, k in products)
    assert fp16.nbytes("planes", "codebooks") == quantized.nbytes("dense") == 0
    for data in "kv_cache", "logits":
        assert fp16.nbytes(data) == 2 * quantized.nbytes(data)
    assert fp16.nbytes("vectors") == quantized.nbytes("vectors")  # float32 in the bundle too
    assert _sum_of_macs(fp16) == _sum_of_macs(quantized)
    steps = [step for each in fp16.operators for step in each.instructions if isinstance(step, Matrix)]
    assert {(step.weight_bits, step.codebook) for step in steps} == {(16, False)}


@pytest.mark.parametrize("name", ["llama-tied-bfloat16", "phi"])
def test_float16_rows_of_an_embedding(name: str, folder: Path) -> None:
    model = Model.open(folder / name)
    shape = Bundle.open(folder / name, skeleton=True).manifest.architecture
    assert Reference(model.prefill.path).is_tied == name.startswith("llama-tied")
    for graph, tokens in (model.decode[2], 1), (model.prefill, 9):
        assert lower(graph, NPU, tokens=tokens, past=3, fp16=True).nbytes("embedding") == tokens * 2 * shape.hidden_size
        row = Reference(graph.path).embedding
        assert lower(graph, NPU, tokens=tokens, past=3).nbytes("embedding") == tokens * row


@pytest.mark.parametrize("name", ["llama-biases", "gemma2"])
def test_the_output_layer_can_be_left_to_the_host(name: str, folder: Path) -> None:
    model = Model.open(folder / name)
    for graph, tokens in (model.decode[4], 1), (model.prefill, 9):
        reference = Reference(graph.path)
        (head, (outputs, inputs)) = list(reference.products.items())[-1]
        whole, layers = (lower(g, NPU, tokens=tokens, past=3) for g in (graph, graph.without_output_layer()))
        assert _sum_of_macs(whole) - _sum_of_macs(layers) == outputs * inputs
        assert whole.nbytes() - layers.nbytes() == reference.by_node()[head] + whole.nbytes("logits")
        assert layers.nbytes("logits") == 0


def _sum_of_macs(program: Program) -> float:
    return float(sum(each.macs for each in program.operators))


def test_a_prompt_moves_what_does_not_fit(folder: Path) -> None:
    """A product reads the prompt once and weights for each part of it, or the other way round: the lesser of both."""
    graph, tokens, chosen = Model.open(folder / "stablelm").prefill, 60, set()
    for activation_kib, stream_kib in (1, 1), (1, 64), (2, 16), (64, 1), (64, 64):
        hardware = NPU.varied(buffers__activation_kib=activation_kib, buffers__stream_kib=stream_kib)
        program = lower(graph, hardware, tokens=tokens, past=0)
        reference = Reference(graph.path)
        for node, (outputs, inputs) in list(reference.products.items())[:-1]:
            (operator,) = (each for each in program.operators if each.node == node)
            weights = reference.by_node(1, 2)[node]
            parts, tiles = ceil(tokens * inputs / 1024 / activation_kib), ceil(weights / 512 / stream_kib)
            ways = {"rows": (parts * weights, tokens * inputs), "weights": (weights, tiles * tokens * inputs)}
            best = min(ways, key=lambda way: sum(ways[way]))
            chosen.add((best, parts > 1, tiles > 1))
            assert operator.nbytes("planes", "codebooks") == ways[best][0]
            assert operator.nbytes("activations") == ways[best][1] + tokens * outputs
    assert {("rows", True, True), ("weights", True, True)} <= chosen  # neither is always the better one


@pytest.mark.parametrize(
    ("activation_kib", "fp16", "cached_reads", "new_reads"),
    [
        # A head's keys and values of 48 new and 16 cached tokens: 2 * 64 * 80 = 10 KiB; 20 KiB in float16.
        (10, False, 1, 0),
        (20, True, 1, 0),
        # They do not fit: a head's queries and outputs, 2 * 48 * 80 = 7.5 KiB, pass in parts. Each part reads what it
        # sees: of n parts that is all cached tokens, and (n + 1) / 2 times the new ones in total. The first read of the
        # new ones is that of the input.
        (9, False, 1, 0),
        (4, False, 2, 0.5),
        (3, False, 3, 1),
        (5, True, 3, 1),
    ],
)
def test_keys_and_values_of_a_prompt_take_room_on_chip(
    folder: Path, activation_kib: int, fp16: bool, cached_reads: int, new_reads: float
) -> None:
    path = _export("stablelm", folder / "stablelm")
    model, manifest = Model.open(path), Bundle.open(path, skeleton=True).manifest
    shape, dim = manifest.architecture, manifest.kv_cache.head_dim
    assert (shape.attention_heads, shape.kv_heads, dim) == (3, 3, 80)
    hardware = NPU.varied(buffers__activation_kib=activation_kib)
    program = lower(model.prefill, hardware, tokens=48, past=16, fp16=fp16)
    steps = [step for operator in program.operators for step in operator.instructions]
    position = shape.layers * 2 * shape.kv_heads * dim * (2 if fp16 else 1)
    assert _moved(steps, Load) == (16 * cached_reads + 48 * new_reads) * position


@pytest.mark.parametrize("name", ["llama-llama3-float16", "gemma2-uncapped"])
@given(
    tokens=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    past=st.lists(st.integers(0, 24), min_size=3, max_size=3),
    rows=st.lists(st.sampled_from([4, 16, 64]), min_size=3, max_size=3),
    kv_bits=st.lists(st.sampled_from([4, 8, 16]), min_size=3, max_size=3),
)
def test_arrays_are_their_entries(
    name: str, folder: Path, tokens: list[int], past: list[int], rows: list[int], kv_bits: list[int]
) -> None:
    graph = Model.open(_export(name, folder / name)).prefill
    numbers = {"matrix_unit__rows": np.array(rows), "formats__kv_bits": np.array(kv_bits)}
    together = lower(graph, NPU.varied(**numbers), tokens=np.array(tokens), past=np.array(past))
    for i in range(3):
        hardware = NPU.varied(matrix_unit__rows=rows[i], formats__kv_bits=kv_bits[i])
        single = lower(graph, hardware, tokens=tokens[i], past=past[i])
        for ours, theirs in zip(together.operators, single.operators, strict=True):
            assert ours.node == theirs.node
            for data in "kv_cache", "activations", "planes", "vectors", "logits":
                assert np.broadcast_to(ours.nbytes(data), 3)[i] == theirs.nbytes(data)
            for opcode in "MM", "MV":
                assert np.broadcast_to(_rows(ours, opcode), 3)[i] == _rows(theirs, opcode)
            assert np.broadcast_to(ours.macs, 3)[i] == theirs.macs


def _rows(operator: Any, opcode: str) -> Any:
    steps = [step for step in operator.instructions if isinstance(step, Matrix) and step.opcode == opcode]
    return sum(step.rows * step.count * np.asarray(step.weight_bits) for step in steps)


@pytest.mark.parametrize(
    ("op_type", "domain", "operator"),
    [("Softplus", "", "Softplus"), ("ReduceSum", "", "ReduceSum"), ("FancyMatMul", "acme", "acme::FancyMatMul")],
)
def test_an_unknown_operator_is_named(op_type: str, domain: str, operator: str, folder: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(folder / "llama" / "decode-2.onnx"), load_external_data=False)
    hidden = next(node for node in proto.graph.node if node.op_type == "RMSNormalization").output[0]
    node = onnx.helper.make_node(op_type, [hidden], ["y"], name="layer/surprise", domain=domain)
    proto.graph.node.append(node)
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(BundleError) as caught:
        lower(read_graph(tmp_path / "odd.onnx"), NPU, tokens=1, past=0)
    wanted = f"{tmp_path / 'odd.onnx'}: node 'layer/surprise': the operator {operator} cannot be lowered"
    assert str(caught.value) == wanted


def test_no_more_tokens_than_the_context(folder: Path) -> None:
    graph = Model.open(folder / "llama").decode[2]
    lower(graph, NPU, tokens=1, past=np.array([0, 63]))
    with pytest.raises(PmpdError, match=r"decode-2\.onnx: 65 tokens are more than the model's context of 64$"):
        lower(graph, NPU, tokens=1, past=np.array([0, 64]))


def test_activations_must_fit_on_chip(folder: Path) -> None:
    graph = Model.open(folder / "stablelm").decode[2]
    small = NPU.varied(buffers__activation_kib=1)
    lower(graph, small, tokens=1, past=0)
    # In float16 the widest node reads 240 and writes 720 elements.
    message = (
        r"^model/layers\.0/self_attn/qkv_proj/\S+: one token's activations take 1\.9 KiB on chip, npu-4k has 1: give"
    )
    for hardware in small, NPU.varied(buffers__activation_kib=np.array([64, 1])):
        with pytest.raises(PmpdError, match=message):
            lower(graph, hardware, tokens=1, past=0, fp16=True)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_logits_take_no_room_on_chip(name: str, folder: Path) -> None:
    """They are stored as they come, from the softcap where there is one: only the hidden state stays."""
    model = Model.open(_export(name, folder / name))
    for graph in model.decode[2], model.prefill:
        for fp16 in False, True:
            program = lower(graph, NPU, tokens=1, past=0, fp16=fp16)
            (head,) = (i for i, each in enumerate(program.operators) if each.node == graph.output_layer[-1].name)
            taken = [each.activation_bytes for each in program.operators[head:]]
            assert taken == [48 * (2 if fp16 else 1)] + [0] * (3 if name == "gemma2" else 0)


def test_a_graph_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"a\.onnx is not an ONNX model .*: export again"):
        read_graph(tmp_path / "a.onnx")
