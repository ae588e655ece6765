"""The tokenizer of a GGUF file as one of transformers.

Built here and not by transformers, whose conversion (4.57 and 5) has one splitting rule for all byte-level vocabularies
of an architecture, takes the start token for the end token, and always adds a start token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pmpd.runtime.errors import PmpdError, one_line, unknown_choice

__all__ = ["SPLITS", "read_tokenizer", "stop_ids"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NONE = (None, "none", "no_vocab")
_MODELS = ("gpt2", "llama")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _cl100k(digits: str) -> str:
    """Return the rule of the vocabulary cl100k, with the digits that go into one piece."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{_CONTRACTIONS}|{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _o200k(digits: str, ending: str) -> str:
    """Return the rule of the vocabulary o200k: words end where case rises."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{_UPPER}*{_LOWER}+{ending}|{first}{_UPPER}+{_LOWER}*{ending}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
# Patterns that a text is split by, one after the other, before bytes are merged: by `tokenizer.ggml.pre`.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (_cl100k(r"\p{N}{1,3}"),)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (_cl100k(r"\p{N}"),)),
    **dict.fromkeys(("tekken",), (_o200k(r"\p{N}", ""),)),
    **dict.fromkeys(("gpt-4o", "llama4", "phi-4-mini"), (_o200k(r"\p{N}{1,3}", _ENDINGS),)),
    "hunyuan-dense": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
}
# The vocabularies whose tokenizers bring text into composed form first.
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez")
# Pieces that a text of their length is not merged for: a word of the vocabulary is taken whole.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "gpt-4o", "llama4", "tekken")
# Control tokens that end a turn or a text, whatever the metadata says of them.
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>"),
)


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a text, that of the metadata first."""
    named = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ids = [token for token in named if type(token) is int]
    tokens, types = _vocabulary(metadata)
    ids += [i for i, token in enumerate(tokens) if token in _ENDS and types[i] == _CONTROL]
    return list(dict.fromkeys(ids))


def read_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """Return the tokenizer with its special tokens and chat template; None if the metadata has none.

    Raises:
        PmpdError: a kind of tokenizer that is not known here, or a damaged vocabulary.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in _NONE:
        return None
    if model not in _MODELS:
        raise PmpdError(f"tokenizer.ggml.model: {unknown_choice('tokenizer', model, _MODELS)}")
    tokens, types = _vocabulary(metadata)
    if not tokens:
        raise PmpdError("tokenizer.ggml.tokens is missing: convert the model again")
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {name: _special(metadata, key, tokens) for name, key in _SPECIALS.items()}
    try:
        build = _byte_level if model == "gpt2" else _sentencepiece
        tokenizer = build(metadata, tokens, types, specials["unk_token"])
        for kind, special in ((_CONTROL, True), (_USER, False)):
            words = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind and token]
            added = [tokenizers.AddedToken(word, normalized=False, special=special) for word in words]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    except PmpdError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise PmpdError(f"its tokenizer is damaged ({one_line(error)}): convert the model again") from None
    _frame(tokenizer, metadata, model, specials)
    marks = {name: token for name, token in specials.items() if token is not None}
    template = metadata.get("tokenizer.chat_template")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **marks)
    wrapped.chat_template = template if isinstance(template, str) and template else None
    return wrapped


_SPECIALS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return tokens and their types."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise PmpdError(f"{len(tokens)} tokens have {len(types)} types: convert the model again")
    return tokens, types


def _special(metadata: Mapping[str, Any], kind: str, tokens: Sequence[str]) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise PmpdError(
            f"tokenizer.ggml.{kind}_token_id is {number!r} of {len(tokens)} tokens: convert the model again"
        )
    return tokens[number]


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> Any:
    """Return a BPE over bytes with the splitting rule that the metadata names."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = metadata.get("tokenizer.ggml.pre")
    if rule not in SPLITS:
        raise PmpdError(f"tokenizer.ggml.pre: {unknown_choice('splitting rule', rule, SPLITS)}, or give the original")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=rule in _WHOLE_WORDS)
    )
    if rule in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[rule]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> Any:
    """Return the BPE of SentencePiece: pieces are merged by their scores, what is in no piece becomes its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise PmpdError(f"{len(tokens)} tokens have {len(scores)} scores: convert the model again")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            list(_merges(tokens, scores, types)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            *([decoders.Strip(content=" ", left=1)] if prefix else []),
        ]
    )
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield pairs of pieces that make a piece, in the order in which SentencePiece merges them."""
    pieces = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER, _UNUSED)}
    for token in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        yield from sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))


def _frame(tokenizer: Any, metadata: Mapping[str, Any], model: str, specials: Mapping[str, str | None]) -> None:
    """Add the start and end tokens that the metadata asks for; a vocabulary of SentencePiece has a start by default."""
    from tokenizers import processors

    first = specials["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token", _starts(metadata, model)) else None
    last = specials["eos_token"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        if model == "gpt2":
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    around = [token for token in (first, last) if token is not None]
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    second = [f"{part}:1" for part in [*([first] if first else []), "$B", *([last] if last else [])]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *second],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def _starts(metadata: Mapping[str, Any], model: str) -> bool:
    """Return whether texts begin with the start token where the metadata does not say so."""
    return model == "llama" or metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3", "tekken")
