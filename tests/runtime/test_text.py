"""Text out of tokens: streaming detokenization, stop strings, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from pmpd.runtime import Bundle, BundleError, PmpdError, Token, Tokenizer
from pmpd.runtime.decode.stop_strings import StopStrings
from pmpd.runtime.format.manifest import FileEntry
from pmpd.runtime.text import TextStream

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", "▁", "▁Hello", "▁world", "lo", ",", "é", "\n", *BYTES]


@pytest.fixture(scope="module")
def byte_level(demo_bundle: Path) -> Tokenizer:
    """The demo model's tokenizer: byte-level BPE, as of Phi, Llama 3 and StableLM."""
    return Tokenizer.from_bundle(Bundle.open(demo_bundle))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer that decodes as Llama 2's does: `▁` for spaces, byte fallback, one leading space dropped."""
    library = Library(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], byte_fallback=True))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(PIECES[:3])
    return Tokenizer(library, None, {})


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, prompt or [])
    return [*(stream.push(i) for i in ids), stream.flush()]


# Without the brackets of special tokens, which tokenizers take for themselves and decoding leaves out.
@given(st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30))
def test_pieces_make_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert "".join(pieces_of(byte_level, ids)) == byte_level.decode(ids) == text


# Most ids of the first few hundred are single bytes: invalid and unfinished characters of every kind.
@given(st.lists(st.integers(0, 300) | st.integers(0, 4095), max_size=20))
def test_pieces_of_any_ids_make_what_decode_gives(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(byte_level, ids)) == byte_level.decode(ids)


def spell(tokens: list[str]) -> list[int]:
    """Return the ids of pieces; text that is not a piece becomes the ids of its bytes."""
    return [
        i
        for token in tokens
        for i in ([PIECES.index(token)] if token in PIECES else [PIECES.index(BYTES[byte]) for byte in token.encode()])
    ]


@given(
    st.lists(st.sampled_from(["<s>", "</s>", "▁", "▁Hello", "▁world", "lo", ",", "é", "\n", "😀", "ß"]), max_size=12),
    st.integers(0, 12),
)
def test_pieces_after_a_prompt_keep_their_spaces(sentencepiece: Tokenizer, tokens: list[str], cut: int) -> None:
    prompt, answer = spell(tokens[:cut]), spell(tokens[cut:])
    continued = sentencepiece.decode(prompt) + "".join(pieces_of(sentencepiece, answer, prompt))
    assert continued == sentencepiece.decode(prompt + answer)


def test_space_after_the_prompt(sentencepiece: Tokenizer) -> None:
    assert pieces_of(sentencepiece, spell(["▁world", "</s>", "▁Hello"]), spell(["▁Hello"])) == [
        " world",
        "",
        " Hello",
        "",
    ]


@pytest.mark.parametrize(("text", "cut"), [("a 😀b", 3), ("a 😀b", 4), ("a 😀b", 5), ("😀", 1), ("ü 😀😀 x", 4)])
def test_a_character_that_the_prompt_begins_is_not_lost(byte_level: Tokenizer, text: str, cut: int) -> None:
    ids = byte_level.encode(text, special_tokens=False)
    begun = byte_level.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert begun + "".join(pieces_of(byte_level, ids[cut:], ids[:cut])) == text


def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated(byte_level: Tokenizer) -> None:
    prompt = byte_level.encode("a \N{REPLACEMENT CHARACTER}", special_tokens=False)
    assert "".join(pieces_of(byte_level, byte_level.encode("bc", special_tokens=False), prompt)) == "bc"


@given(st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12), st.integers(0, 40))
def test_pieces_after_any_cut_complete_the_text(byte_level: Tokenizer, text: str, cut: int) -> None:
    ids = byte_level.encode(text, special_tokens=False)
    prompt = ids[:cut]
    pieces = "".join(pieces_of(byte_level, ids[cut:], prompt))
    assert text.endswith(pieces)
    shown = byte_level.decode(prompt)
    if not shown.endswith("\N{REPLACEMENT CHARACTER}"):
        assert shown + pieces == text


def test_emoji_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a 😀!", special_tokens=False)
    pieces = pieces_of(byte_level, ids)
    assert len(ids) >= 6  # the emoji takes several tokens, so this tests something
    assert "".join(pieces) == "a 😀!"
    assert sum("😀" in piece for piece in pieces) == 1


def test_unfinished_character_comes_out_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x😀", special_tokens=False)[:-1]
    *pieces, rest = pieces_of(byte_level, ids)
    assert "".join(pieces) == "x"
    assert rest == byte_level.decode(ids)[1:]
    assert set(rest) == {"\N{REPLACEMENT CHARACTER}"}


def tokens_of(texts: list[str]) -> list[Token]:
    return [Token(id=i, index=i, precision=4, seconds=0.0, text=text) for i, text in enumerate(texts)]


@given(
    st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_against_brute_force(texts: list[str], strings: list[str]) -> None:
    want, found = "".join(texts), False
    for n in range(1, len(texts) + 1):
        so_far = "".join(texts[:n])
        starts = [so_far.find(string) for string in strings if string in so_far]
        if starts:
            want, found = so_far[: min(starts)], True
            break
    stop = StopStrings(strings)
    out: list[Token] = []
    for token in tokens_of(texts):
        out += stop.push(token)
        so_far = "".join(texts[: token.index + 1])
        held_for_a_reason = any(so_far.endswith(string[:k]) for string in strings for k in range(1, len(string)))
        if stop.found:
            break
        if texts[token.index] and not held_for_a_reason:
            assert len(out) == token.index + 1  # nothing waits without need
    if not stop.found:
        out += stop.flush("")
    assert stop.found == found
    assert "".join(token.text or "" for token in out) == want
    assert [token.id for token in out] == list(range(len(out)))
    assert [token.text for token in out[:-1]] == texts[: len(out)][:-1]  # only the last is ever cut


def test_stop_string_inside_a_token_and_across_tokens() -> None:
    stop = StopStrings(["END"])
    assert [token.text for token in stop.push(tokens_of(["go onEND now"])[0])] == ["go on"]
    assert stop.found
    stop = StopStrings(["END", "\n\n"])
    first, second, third = tokens_of(["a\n", "\t E", "ND!"])
    assert stop.push(first) == []  # may be the start of a blank line
    assert stop.push(second) == []  # was not, but may be the start of END
    assert [token.text for token in stop.push(third)] == ["a\n", "\t "]


def test_rest_goes_with_the_last_token() -> None:
    stop = StopStrings([])
    first, second = tokens_of(["a", ""])
    assert stop.push(first) == [first]
    assert stop.push(second) == []
    assert [token.text for token in stop.flush("?")] == ["?"]


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(PmpdError, match="must not be empty"):
        StopStrings(["x", ""])


CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|' + message.role + '|>' + message['content'] | trim + eos_token }}\n"
    "  {% endfor %}\n"
    "{% if add_generation_prompt %}\n<|assistant|>{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "  Tell me a story. "},
    {"role": "assistant", "content": "Once upon a time."},
    {"role": "user", "content": "Go on!"},
]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer._tokenizer, template, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("template", [CHATML, ALTERNATING])
def test_chat_template_renders_as_in_transformers(byte_level: Tokenizer, template: str) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_level._tokenizer, chat_template=template, bos_token="<s>", eos_token="</s>"
    )
    want = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    tokenizer = with_template(byte_level, template)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES) == byte_level.encode(want, special_tokens=False)


def test_chat_template_by_hand(byte_level: Tokenizer) -> None:
    want = "<s>[INST] Tell me a story. [/INST] Once upon a time. </s>[INST] Go on! [/INST]"
    ids = with_template(byte_level, ALTERNATING).apply_chat_template(MESSAGES)
    assert ids == byte_level.encode(want, special_tokens=False)
    assert ids.count(1) == 1  # one <s>: the template's, none of the tokenizer's
    assert ids.count(2) == 1


def test_template_refuses_messages_with_its_own_words(byte_level: Tokenizer) -> None:
    with pytest.raises(PmpdError, match="refuses the conversation: roles must alternate user/assistant"):
        with_template(byte_level, ALTERNATING).apply_chat_template(MESSAGES[1:])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__['__builtins__'] }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append({'role': 'user', 'content': 'injected'}) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ undefined_thing.attribute }}",
        "{% if %}",
    ],
)
def test_template_cannot_leave_the_sandbox_or_crash(byte_level: Tokenizer, template: str) -> None:
    messages = [dict(message) for message in MESSAGES]
    tokenizer = with_template(byte_level, template)
    with pytest.raises(PmpdError, match="the model's chat template refuses the conversation"):
        tokenizer.apply_chat_template(messages)
    assert messages == MESSAGES


def test_model_without_template(byte_level: Tokenizer) -> None:
    assert not byte_level.has_chat_template
    with pytest.raises(PmpdError, match="no chat template"):
        byte_level.apply_chat_template(MESSAGES)


def test_special_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.encode("Hi")[0] == 1
    assert byte_level.encode("Hi")[1:] == byte_level.encode("Hi", special_tokens=False)
    assert byte_level.decode([1, *byte_level.encode("Hi"), 2]) == "Hi"


def test_template_that_goes_beyond_a_bound(byte_level: Tokenizer) -> None:
    with pytest.raises(PmpdError, match="template makes too much text") as caught:
        with_template(byte_level, "{{ 'x' * 10 ** 9 }}").apply_chat_template(MESSAGES)
    assert "\n" not in str(caught.value)


def test_error_of_a_template_is_one_line(byte_level: Tokenizer) -> None:
    with pytest.raises(PmpdError, match="first second") as caught:
        with_template(byte_level, "{{ raise_exception('first\\nsecond ' ~ 'x' * 100000) }}").apply_chat_template(
            MESSAGES
        )
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_tools_and_variables_reach_the_template(byte_level: Tokenizer) -> None:
    template = "{{ tools | tojson }}{{ documents }}{{ thinking }}{{ add_generation_prompt }}"
    ids = with_template(byte_level, template).apply_chat_template(
        MESSAGES, tools=[{"name": "<f>"}], add_generation_prompt=False, variables={"thinking": "no"}
    )
    assert byte_level.decode(ids) == '[{"name": "<f>"}]NonenoFalse'


@pytest.mark.parametrize(
    ("messages", "want"),
    [
        ([*MESSAGES[:2], {"role": "user", "content": "Go "}], "a<|user|>Go "),
        (
            [*MESSAGES[:1], {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "It "}]}],
            "It ",
        ),
    ],
    ids=["text", "parts"],
)
@pytest.mark.parametrize("trim", ["", " | trim"], ids=["as it is", "trimmed"])
def test_a_final_message_is_continued_as_in_transformers(
    byte_level: Tokenizer, messages: list[dict[str, Any]], want: str, trim: str
) -> None:
    template = (
        "{% for m in messages %}a<|{{ m.role }}|>{% if m.content is string %}{{ m.content" + trim + " }}{% else %}"
        "{% for p in m.content %}{{ (p.text or '')" + trim + " }}{% endfor %}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level._tokenizer, chat_template=template)
    ours = with_template(byte_level, template).chat_text(messages, continue_final_message=True)
    assert ours == theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.endswith(want.rstrip() if trim else want)
    assert messages[-1]["content"] in ("Go ", [{"type": "image"}, {"type": "text", "text": "It "}])


def test_a_message_that_the_template_leaves_out_cannot_be_continued(byte_level: Tokenizer) -> None:
    for template, messages in (("Hi", MESSAGES), (CHATML, []), (CHATML, [{"role": "user"}])):
        with pytest.raises(PmpdError, match="continue"):
            with_template(byte_level, template).chat_text(messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "system", "tools", "end"),
    [
        (CHATML, True, False, 2),
        (ALTERNATING, False, False, 2),  # refuses a system message; a space before the end
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", False, False, None),
        ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}\n### {% endfor %}", True, True, None),
        ("{% if messages %}{{ raise_exception('no') }}{% endif %}", False, False, None),
    ],
)
def test_what_a_template_can_do(
    byte_level: Tokenizer, template: str, system: bool, tools: bool, end: int | None
) -> None:
    tokenizer = with_template(byte_level, template)
    assert (tokenizer.has_system_role, tokenizer.has_tools, tokenizer.end_of_turn) == (system, tools, end)


def test_conversations_with_tools_may_have_a_template_of_their_own(byte_level: Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level._tokenizer, "plain", {}, tool_template="{{ tools[0].name }}")
    assert tokenizer.chat_text(MESSAGES) == "plain"
    assert tokenizer.chat_text(MESSAGES, tools=[{"name": "f"}]) == "f"


def bundle_with(demo_bundle: Path, folder: Path, **files: str) -> Bundle:
    """Return a bundle of nothing but these files (dots in names written as __); only its tokenizer can be read."""
    manifest = Bundle.open(demo_bundle).manifest
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    manifest.files.clear()
    manifest.files.update({name.replace("__", "."): FileEntry(size=1, sha256="") for name in files})
    return Bundle(folder, manifest)


def test_tokenizer_files_of_a_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    text = (demo_bundle / "tokenizer.json").read_text(encoding="utf-8")
    bundle = bundle_with(
        demo_bundle,
        tmp_path,
        tokenizer__json=text,
        chat_template__jinja="{{ eos_token }}{{ messages[0].content }}",
        chat_template_tool_use__jinja="tools",
        special_tokens_map__json='{"eos_token": "</s>"}',
    )
    assert Tokenizer.from_bundle(bundle).chat_text([], tools=[]) == "tools"
    ids = Tokenizer.from_bundle(bundle).apply_chat_template([{"role": "user", "content": "é"}])
    assert ids[0] == 2
    with pytest.raises(BundleError, match=r"has no tokenizer\.json: use token ids"):
        Tokenizer.from_bundle(bundle_with(demo_bundle, tmp_path))
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_bundle(bundle_with(demo_bundle, tmp_path, tokenizer__json="{}"))


@pytest.mark.parametrize(
    ("specials", "bos"),
    [
        ('{"bos_token": "<s>"}', "<s>"),
        ('{"bos_token": {"content": "<s>", "lstrip": false}, "messages": "x"}', "<s>"),
        ('{"bos_token": "<s>", "additional_special_tokens": ["<a>", {"content": "<b>"}], "pad_token": null}', "<s>"),
        ("{}", ""),
    ],
)
def test_special_tokens_are_texts_or_objects(demo_bundle: Path, tmp_path: Path, specials: str, bos: str) -> None:
    files = {
        "tokenizer__json": (demo_bundle / "tokenizer.json").read_text(encoding="utf-8"),
        "chat_template__jinja": "{{ bos_token }}{{ messages[0].content }}",
        "special_tokens_map__json": specials,
    }
    tokenizer = Tokenizer.from_bundle(bundle_with(demo_bundle, tmp_path, **files))
    want = tokenizer.encode(bos + "Hi", special_tokens=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == want


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("special_tokens_map.json", b"{", "is not valid JSON"),
        ("special_tokens_map.json", b"[" * 100_000, "is not valid JSON"),
        ("special_tokens_map.json", b"\xff", "cannot be read"),
        ("special_tokens_map.json", b"[1]", "not an object"),
        ("special_tokens_map.json", b"7", "not an object"),
        ("special_tokens_map.json", b'{"eos_token": 7}', "has the special token 7, not a text"),
        ("special_tokens_map.json", b'{"eos_token": {"content": 7}}', "not a text"),
        ("special_tokens_map.json", b'{"extra_tokens": [[]]}', "not a text"),
        ("chat_template.jinja", b"\xff{{ x }}", "cannot be read"),
        ("tokenizer.json", b"\xff", "cannot be read"),
        ("tokenizer.json", b"[" * 100_000, "cannot be read"),
    ],
)
def test_text_files_that_are_not_what_they_should_be(
    demo_bundle: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    files = {"tokenizer__json": (demo_bundle / "tokenizer.json").read_text(encoding="utf-8")}
    files.setdefault(name.replace(".", "__"), "{}")
    bundle = bundle_with(demo_bundle, tmp_path, **files)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer.from_bundle(bundle)
    assert name in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_panic_of_the_tokenizers_library_is_an_error(demo_bundle: Path, tmp_path: Path) -> None:
    document = json.loads((demo_bundle / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    bundle = bundle_with(demo_bundle, tmp_path, tokenizer__json=json.dumps(document))
    with pytest.raises(PmpdError, match=r"cannot be read|the tokenizer fails"):
        Tokenizer.from_bundle(bundle).encode("Hi")


def test_special_tokens_by_name(byte_level: Tokenizer) -> None:
    assert (byte_level.special_id("bos_token"), byte_level.special_id("eos_token")) == (1, 2)
    assert byte_level.special_id("sep_token") is None
    listed = Tokenizer(byte_level._tokenizer, "{{ messages }}", {"bos_token": "no such token", "eos_token": ["</s>"]})
    assert listed.special_id("bos_token") is None
    assert listed.special_id("eos_token") is None  # several: none of them is the one
    assert (byte_level.chat_template, listed.chat_template) == (None, "{{ messages }}")
