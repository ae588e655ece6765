"""Skeletons: the graphs and tensor table of a real export without its weights, which nothing runs by accident."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from tiny_models import TINY_MODELS

from pmpd.exporter import ExportConfig, Skeleton, export_bundle, export_skeleton, outline
from pmpd.exporter.cli import main
from pmpd.runtime import Bundle, BundleError, Generator, Manifest, PmpdError
from pmpd.runtime.engine.sessions import open_session
from pmpd.tvm_kernels.models import MODELS, shipped_models

# Parameters as published (millions), norms included, which ours are without.
PUBLISHED = {
    "llama-2-7b": 6738.4,
    "llama3-8b": 8030.3,
    "mobilellama-1.4b": 1364.6,
    "phi-1": 1418.3,
    "phi-1.5": 1418.3,
    "phi-2": 2779.7,
    "qwen2.5-0.5b": 494.0,
    "qwen3-0.6b": 596.0,
    "gemma-2-2b": 2614.2,
    "gemma-3-1b": 999.8,
    "smollm2-135m": 134.5,
    "stablelm-zephyr-3b": 2795.4,
    "vicuna-13b": 13015.9,
    "vicuna-7b": 6738.4,
}
FILES = ["README.md", "bundle.json", "decode-2.onnx", "decode-4.onnx", "prefill.onnx"]
# Without torch and whatever else reads checkpoints; the peak of memory and the time from the start go to stdout.
MEASURED = """
import sys, time
begin = time.perf_counter()
for name in ("torch", "transformers", "huggingface_hub"):
    sys.modules[name] = None
from pathlib import Path
from pmpd.exporter import ExportConfig, export_skeleton
export_skeleton(ExportConfig(model=sys.argv[1], output=Path(sys.argv[2])))
seconds = time.perf_counter() - begin
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) / 1024)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_MODELS["llama"].config()))
    return folder


@pytest.fixture(scope="module")
def skeleton(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "skeleton"
    export_skeleton(ExportConfig(model=str(tiny), output=output, precisions=(4, 2)))
    return output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--skeleton", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama-odd", {"precisions": (4, 2), "prefill": 2}),
        ("llama-tied-bfloat16", {"precisions": (3, 1), "parent": 5, "head_precision": 3, "context_length": 40}),
        ("phi-qk-norm", {"precisions": (4, 3, 2), "schedule": "static:3@2,2@9"}),
        ("stablelm-biases", {"precisions": (4,), "groups": 2}),
    ],
)
def test_it_is_the_real_export_without_weights(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = TINY_MODELS[kind].save(tmp_path / "model")
    config = ExportConfig(model=str(model), output=tmp_path / "real", calibration="none", targets=(), **options)
    real = export_bundle(config)
    bare = export_skeleton(ExportConfig(model=str(model), output=tmp_path / "bare", **options))
    for graph in real.graphs:
        assert (tmp_path / "bare" / graph.file).read_bytes() == (tmp_path / "real" / graph.file).read_bytes()
    differences = {"files", "verified", "verification", "skeleton", "quality"}
    ours, theirs = vars(bare).copy(), vars(real).copy()
    assert {name for name in ours if ours[name] != theirs[name]} == differences
    assert bare.tensors == real.tensors
    assert names(tmp_path / "bare") == sorted(["README.md", "bundle.json", *(graph.file for graph in real.graphs)])


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_shipped_models(model: str, tmp_path: Path) -> None:
    manifest = export_skeleton(ExportConfig(model=model, output=tmp_path / "out"))
    assert manifest.architecture.parameters / 1e6 == pytest.approx(PUBLISHED[model], rel=1e-3)
    bundle = Bundle.open(tmp_path / "out", verify=True, skeleton=True)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    (tmp_path / "weights.bin").touch()  # the checker wants a file, and does not look into it
    for graph in bundle.manifest.graphs:
        proto = onnx.load(str(bundle.path / graph.file), load_external_data=False)
        outside = [tensor for tensor in proto.graph.initializer if tensor.external_data]
        assert {tensor.name for tensor in outside} < tensors.keys()  # codebooks of other precisions are the rest
        for tensor in outside:
            reference = {entry.key: entry.value for entry in tensor.external_data}
            entry = tensors[tensor.name]
            share = graph.precision / entry.shape[0] if entry.nested else 1
            assert reference == {
                "location": "weights.bin",
                "offset": str(entry.offset),
                "length": str(round(entry.length * share)),
            }
        onnx.save(proto, tmp_path / graph.file)
        onnx.checker.check_model(str(tmp_path / graph.file))


def test_every_shipped_model_is_known_and_has_an_alias() -> None:
    assert set(shipped_models()) == PUBLISHED.keys() <= MODELS.keys()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_a_large_model_takes_no_torch_little_time_and_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURED, "vicuna-13b", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    seconds, megabytes = map(float, process.stdout.split())
    assert seconds < 10
    assert megabytes < 300  # one layer's planes at 4 bits are 160, the file 7,000
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < 2e6


def test_a_skeleton_is_opened_on_request_only(skeleton: Path) -> None:
    refusal = f"{skeleton} is a skeleton without weights: .* without --skeleton"
    with pytest.raises(BundleError, match=refusal):
        Bundle.open(skeleton)
    bundle = Bundle.open(skeleton, skeleton=True)
    assert names(skeleton) == FILES
    refused: list[Callable[[], object]] = [
        lambda: bundle.tensor(bundle.manifest.tensors[0]),
        lambda: Generator(bundle, kernels=False),
        lambda: open_session(bundle, bundle.manifest.graphs[0], threads=1),
    ]
    for use in refused:
        with pytest.raises(BundleError, match=refusal):
            use()


@pytest.mark.parametrize("command", ["runtime", "eval"])
def test_commands_refuse_a_skeleton_in_one_line(command: str, skeleton: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("The owl saw a tree.")
    run = f"import sys; from pmpd.{command}.cli import main; main()"
    options = ["-p", "x"] if command == "runtime" else ["--task", "perplexity", "--data", str(tmp_path / "data.txt")]
    process = subprocess.run(
        [sys.executable, "-c", run, str(skeleton), *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(f"error: {skeleton} is a skeleton without weights")
    assert process.stderr.count("\n") == 1


def test_the_manifest_says_it(skeleton: Path, demo_bundle: Path) -> None:
    document = json.loads((skeleton / "bundle.json").read_text())
    assert document["skeleton"] is True
    assert json.loads((demo_bundle / "bundle.json").read_text())["skeleton"] is False
    assert Manifest.from_json(json.dumps(document)).skeleton
    damaged: list[tuple[dict[str, Any], str]] = [
        ({"skeleton": False}, "refers to 'weights.bin' but does not list it"),
        ({"skeleton": 1}, "skeleton must be bool"),
        ({"files": document["files"] | {"weights.bin": {"size": 1, "sha256": ""}}}, "lists 'weights.bin'"),
        ({"tensors": [document["tensors"][0] | {"file": "../w"}]}, "'../w', which lies outside the bundle"),
    ]
    for change, message in damaged:
        with pytest.raises(BundleError, match=message):
            Manifest.from_json(json.dumps(document | change))


def test_the_command_names_what_it_wrote(tiny: Path, place: Path) -> None:
    result = export("-m", tiny, "--precisions", "4,2")
    assert (result.exit_code, result.stdout) == (0, "model-skeleton\n")
    assert names(place / "model-skeleton") == FILES
    card = (place / "model-skeleton" / "README.md").read_text()
    assert "decodes at 4, 2 bits" in card
    assert "does not run" in card
    assert json.loads(export("-m", tiny, "-o", "other", "--json", "-").stdout)["bundle"] == "other"
    assert export("-m", "demo").exit_code == 0
    (place / "vicuna-7b").mkdir()  # a folder comes before the name of a model
    assert "vicuna-7b has no config.json" in export("-m", "vicuna-7b").stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(place: Path) -> None:
    result = export("-m", "vicuna-7b", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("model     vicuna-7b: llama, 6,738.1 M parameters, 32 layers, context 4096\n")
    assert "skeleton  graphs and tensor table, without the weights" in result.stdout
    assert names(place) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m vicuna7b", "unknown model 'vicuna7b': choose one of vicuna-7b, "),
        ("-m lmsys/vicuna-7b-v1.5", "choose one of vicuna-7b, "),
        ("-m longchat-13b", "choose one of "),
        ("-m .", "has no config.json: give a Hugging Face checkpoint's folder"),
        ("-m vicuna-7b --calibration FILE", "a skeleton has no weights to use --calibration for: leave out"),
        ("-m vicuna-7b --calibration-samples 3", "--calibration-samples"),
        ("-m vicuna-7b --calibration-length 3", "--calibration-length"),
        ("-m vicuna-7b --target none", "--target"),
        ("-m vicuna-7b --target x86-64-v4", "--target"),
        ("-m vicuna-7b --accuracy exact", "--accuracy"),
        ("-m vicuna-7b --seed-precision 1", "--seed-precision"),
        ("-m vicuna-7b --revision main", "--revision"),
        ("-m vicuna-7b --precisions 9", "precision must be 1 to 8 bits, got 9"),
        ("-m vicuna-7b --context-length 4097", "context length 4097: the model allows 1 to 4096"),
        ("-m vicuna-7b -o FILE", "exists: choose another --output"),
        ("-m vicuna-7b -o FILE --overwrite", "is not a bundle, and --overwrite replaces only bundles"),
        ("-m vicuna-7b -o FILE/out", "Not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments: str, message: str, place: Path) -> None:
    (place.parent / "file.txt").write_text("Some text.")
    result = export(*arguments.replace("FILE", str(place.parent / "file.txt")).split())
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert names(place) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt3"}, "unknown architecture 'gpt3'"),
        ({"hidden_size": "48"}, "hidden_size must be a whole number of 1 or more, got '48'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of 1 or more, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number of 1 or more, got -1"),
        ({"vocab_size": 32000.5}, "vocab_size must be a whole number of 1 or more, got 32000.5"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be a whole number of 1 or more, got None"),
        ({"head_dim": -3}, "head_dim must be a whole number of 1 or more, got -3"),
        ({"num_key_value_heads": 2}, "3 attention heads cannot share 2 key and value heads"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be above 0 and at most 1, got 1.5"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_line(change: dict[str, Any], message: str, place: Path) -> None:
    (place.parent / "config.json").write_text(json.dumps(TINY_MODELS["llama"].config() | change))
    result = export("-m", place.parent)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: config.json: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert names(place) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(
    failure: BaseException, tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(model=str(tiny), output=place / "out", overwrite=True)
    export_skeleton(config)
    before = (place / "out" / "bundle.json").read_bytes()
    export_now = Skeleton.prepare(config)
    built: list[object] = []

    def build(*arguments: Any, **options: Any) -> Any:
        if len(built) == 2:
            raise failure
        built.append(arguments)
        return build_graph(*arguments, **options)

    build_graph = outline.build_graph
    monkeypatch.setattr(outline, "build_graph", build)
    with pytest.raises((PmpdError, KeyboardInterrupt)):
        export_now.run()
    assert names(place) == ["out"]
    assert (place / "out" / "bundle.json").read_bytes() == before


def test_only_overwrite_replaces(tiny: Path, place: Path) -> None:
    assert export("-m", tiny, "-o", "out", "--precisions", "4,2").exit_code == 0
    assert "exists: choose another --output" in export("-m", tiny, "-o", "out").stderr
    assert export("-m", tiny, "-o", "out", "--precisions", "3", "--overwrite").exit_code == 0
    assert names(place) == ["out"]
    assert Bundle.open("out", skeleton=True).manifest.precisions == (3,)
