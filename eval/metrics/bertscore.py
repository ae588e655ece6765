"""BERTScore (Zhang et al., 2020): how well the words of two texts match, by the cosines of their embeddings.

Each token of the output is matched with the most similar one of the reference, which gives precision, and the other way
round, which gives recall. Tokens have equal weights (no idf), scores are not rescaled. The numbers are those of the
package bert-score 0.3.13 with the same encoder and layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pmpd.exporter.source.models import published_name, resolve_model
from pmpd.runtime.errors import MissingExtraError, PmpdError, one_line, unknown_choice
from pmpd.runtime.format.bundle import sha256_of

if TYPE_CHECKING:
    import torch

__all__ = ["BertScore", "Encoder", "bertscore_f1"]

# Hub ids of well-known encoders, and the layer that agrees best with people's judgement of translations (WMT16), as the
# authors of BERTScore measured it.
_LAYERS = {
    "FacebookAI/roberta-large": 17,
    "FacebookAI/roberta-base": 10,
    "FacebookAI/xlm-roberta-large": 17,
    "FacebookAI/xlm-roberta-base": 9,
    "google-bert/bert-base-uncased": 9,
    "google-bert/bert-large-uncased": 18,
    "google-bert/bert-base-multilingual-cased": 9,
    "distilbert/distilroberta-base": 5,
    "distilbert/distilbert-base-uncased": 5,
    "microsoft/deberta-large-mnli": 18,
    "microsoft/deberta-xlarge-mnli": 40,
    "microsoft/deberta-v3-base": 9,
    "microsoft/deberta-v3-large": 12,
    "microsoft/mpnet-base": 8,
}
_HUB_IDS = {hub_id.rpartition("/")[2]: hub_id for hub_id in _LAYERS}
_BATCH = 32  # pairs whose texts are encoded together


class BertScore(NamedTuple):
    """Precision, recall and their harmonic mean of one pair of texts, -1 to 1 (in practice 0.3 to 1)."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Encoder:
    """A bidirectional model of transformers that embeds tokens. Use `Encoder.load`.

    Attributes:
        name: as it was asked for; of a folder only the last part.
        layer: the layer whose outputs are the embeddings, 1 for the first.
        digest: SHA-256 of its configuration and weights, hexadecimal.
        tokenizer, model: of transformers; the model ends after that layer.
        limit: the most tokens of a text, special ones included; None for any number.
    """

    name: str
    layer: int
    digest: str
    tokenizer: Any
    model: Any
    limit: int | None

    @classmethod
    def load(cls, model: str | Path | None, *, layer: int | None = None, threads: int | None = None) -> Self:
        """Load an encoder in float32.

        Args:
            model: a folder with config.json, safetensors and tokenizer.json, a hub id, or a well-known name such as
                `roberta-large`.
            layer: by default the one that bert-score takes for a well-known name, else the last one.
            threads: how many PyTorch computes with, in the whole process; as it is by default.

        Raises:
            PmpdError: no encoder is given, it cannot be found or read, it is no encoder, or it has no such layer.
            MissingExtraError: transformers or torch is not installed.
        """
        if model is None:
            raise PmpdError(
                "BERTScore needs an encoder: give its folder, or a hub id such as FacebookAI/roberta-large (1.4 GB)"
            )
        try:
            import torch
            from transformers import AutoConfig, AutoTokenizer
        except ImportError as error:
            raise MissingExtraError(error.name or "transformers", "eval") from None
        path = _resolve(str(model))
        name = published_name(str(model))
        if threads is not None:
            torch.set_num_threads(threads)
        offline = {"local_files_only": True, "trust_remote_code": False}
        config = _readable(path, lambda: AutoConfig.from_pretrained(path, **offline))
        tokenizer = _readable(path, lambda: AutoTokenizer.from_pretrained(path, **offline))
        if config.is_encoder_decoder or None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            raise PmpdError(
                f"{path} is not an encoder ({config.model_type}): give one like BERT, RoBERTa or DeBERTa for BERTScore"
            )
        layers = config.num_hidden_layers
        if layer is None:
            hub_id = _HUB_IDS.get(name.rpartition("/")[2])
            layer = layers if hub_id is None else _LAYERS[hub_id]
        if not 1 <= layer <= layers:
            raise PmpdError(f"{path} has no layer {layer}: give one from 1 to {layers} for BERTScore")
        encoder = _readable(path, lambda: _load_layers(path, layer))
        return cls(
            name=name,
            layer=layer,
            digest=_digest([path / "config.json", *sorted(path.glob("*.safetensors"))]),
            tokenizer=tokenizer,
            model=encoder,
            limit=_limit(tokenizer, encoder),
        )

    def describe(self) -> dict[str, str | int]:
        """Return what results say of the encoder: its name, layer and digest."""
        return {"name": self.name, "layer": self.layer, "sha256": self.digest}

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[BertScore]:
        """Return the scores of pairs (output, reference).

        Texts that are too long for the encoder are cut. A text without words scores 0, also against another one. The
        texts that share a batch change a score by some 1e-7.
        """
        tokens = {text: self._tokens(text) for pair in pairs for text in pair}
        order = sorted(range(len(pairs)), key=lambda i: max(len(tokens[text]) for text in pairs[i]))
        scores: dict[int, BertScore] = {}
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            texts = list(dict.fromkeys(text for i in batch for text in pairs[i]))
            embeddings = dict(zip(texts, self._embed([tokens[text] for text in texts]), strict=True))
            for i in batch:
                output, reference = pairs[i]
                scores[i] = _match(
                    embeddings[output],
                    self._words(tokens[output]),
                    embeddings[reference],
                    self._words(tokens[reference]),
                )
        return [scores[i] for i in range(len(pairs))]

    def _tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, special ones at its ends included."""
        text = text.strip()
        if text and type(self.tokenizer).__name__.startswith("Roberta"):
            text = f" {text}"  # the first word is to be the same token as elsewhere
        ids: list[int] = self.tokenizer(text, truncation=self.limit is not None, max_length=self.limit)["input_ids"]
        return ids

    def _words(self, ids: Sequence[int]) -> list[bool]:
        """Return which tokens count: those that are not special."""
        special = {self.tokenizer.cls_token_id, self.tokenizer.sep_token_id}
        return [token not in special for token in ids]

    def _embed(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the embeddings ``[tokens, hidden]`` of texts, of length 1 each."""
        import torch

        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            output = self.model(input_ids=ids, attention_mask=mask)[0]  # [texts, tokens, hidden]
            output = torch.nn.functional.normalize(output, dim=-1)
        return [output[row, : len(tokens)] for row, tokens in enumerate(texts)]


def bertscore_f1(encoder: Encoder, samples: Iterable[tuple[str, Sequence[str]]]) -> list[float]:
    """Return the F1 of samples (output, references), 0 to 100.

    Of several references the mean counts, as for ROUGE (the package bert-score takes the best one).
    """
    samples = list(samples)
    scores = iter(encoder.score([(output, text) for output, references in samples for text in references]))
    return [100.0 * sum(next(scores).f1 for _ in references) / len(references) for _, references in samples]


def _match(
    output: torch.Tensor, output_words: list[bool], reference: torch.Tensor, reference_words: list[bool]
) -> BertScore:
    """Match embeddings ``[tokens, hidden]``. Special tokens can be matched, but what matches them does not count."""
    if not any(output_words) or not any(reference_words):
        return BertScore(0.0, 0.0, 0.0)
    similarity = output @ reference.T  # [output tokens, reference tokens]
    precision = float(similarity.amax(1)[output_words].mean())
    recall = float(similarity.amax(0)[reference_words].mean())
    total = precision + recall
    return BertScore(precision, recall, 2 * precision * recall / total if total else 0.0)


def _resolve(model: str) -> Path:
    """Return the folder of an encoder."""
    path = Path(model).expanduser()
    if not path.exists() and "/" not in model:
        if model not in _HUB_IDS:
            choices = unknown_choice("encoder", model, _HUB_IDS)
            raise PmpdError(f"{choices}, or give a hub id (owner/name) or a folder")
        model = _HUB_IDS[model]
    path = resolve_model(model)
    if not (path / "config.json").is_file():
        raise PmpdError(f"{path} has no config.json: give the folder of an encoder in the format of Hugging Face")
    return path


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except PmpdError:
        raise
    except Exception as error:  # transformers and tokenizers raise all kinds
        raise PmpdError(
            f"transformers cannot read the encoder {path} ({one_line(error)}): "
            "it needs config.json, tokenizer.json and safetensors weights; fetch it again, or give another one"
        ) from None


def _load_layers(path: Path, layer: int) -> Any:
    """Return an encoder that ends after a layer.

    Raises:
        PmpdError: it lacks weights, which transformers would make up.
    """
    import torch
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers 5 shows one for loading
    model, report = AutoModel.from_pretrained(
        path,
        num_hidden_layers=layer,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise PmpdError(f"{path} lacks weights ({', '.join(missing[:5])}): give a complete checkpoint of the encoder")
    return model.eval()


def _limit(tokenizer: Any, model: Any) -> int | None:
    """Return the most tokens that an encoder takes: what its tokenizer says, and what it has positions for."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 1e9 else []  # 1e30 where it says nothing
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = module.padding_idx
            limits.append(module.num_embeddings - (0 if padding is None else padding + 1))  # RoBERTa's begin after it
    return min(limits, default=None)


def _digest(files: Sequence[Path]) -> str:
    lines = "".join(f"{sha256_of(file)} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
