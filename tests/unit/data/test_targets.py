"""What is learned: every answer with its closing separator, of exactly the ids that the whole text has.

Which bytes of a text a token writes is computed here from the tokens' spelling alone, without the library's offsets.
"""

import copy
import json
from itertools import groupby, pairwise

import numpy as np
import pytest
from chat_factory import write_aquila_tokenizer, write_sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from aquila_pd import AquilaTokenizer
from aquila_pd.data.targets import Sample, encode_conversation, knows_system, targets_of
from aquila_pd.text.prompts import ChatPrompts
from aquila_pd.tokenization.chat_templates import TEMPLATES, Piece
from aquila_pd.utils.errors import ChatError, ConfigError, TokenizerError

SPECIALS = ["<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "</s>", "<|im_start|>", "<|im_end|>"]

# What somebody may write: separators, headers, special tokens, their parts, characters of several bytes, white space.
WORDS = [
    *SPECIALS,
    "###",
    "#",
    "### Human: ",
    "###Assistant:",
    "Human: ",
    "Assistant:",
    "<human>:",
    "<bot>:",
    "</",
    "s>",
    "endofpiece|>",
    "你好",
    "北京。",
    "👨‍👩‍👧",
    "🙂",
    "👋🏽",
    "e\u0301",
    "\u0301",
    "\u200d",
    "ﬁ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u3000",
    "hello",
    " Hello",
    ":",
    ")",
    ":)",
    "''",
    "x",
    "1234",
]
TEXT = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


def talk(*contents: str, system: str | None = None) -> list[dict]:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


# ------------------------------------------------------------------------------------------------- tokenizers


def with_chatml(tokenizer: AquilaTokenizer) -> AquilaTokenizer:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def aquila(folder) -> AquilaTokenizer:
    return with_chatml(AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(folder))))


def all_texts() -> list[str]:
    """Conversations in every template: what merges are learned from, so that they run over every border."""
    said = talk("hello, who", "Hello.\n", "你好 #", "  北京 :)")
    return [
        "".join(piece.text for piece in template.render(said, False) if piece.text not in template.specials)
        for template in TEMPLATES.values()
    ]


def borderless(folder) -> AquilaTokenizer:
    """A byte-level BPE that splits nowhere: headers, words and separators merge with each other."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [part for text in all_texts() for n in (3, 5, 7) for part in (text[i : i + n] for i in range(len(text)))],
        trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_special_tokens(SPECIALS)
    return AquilaTokenizer(tokenizer_object=backend, eos_token="</s>")


def trimming(folder) -> AquilaTokenizer:
    """One whose post-processor leaves leading spaces out of spans, as published tokenizer.json files have it."""
    tokenizer = aquila(folder)
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def sentencepiece(folder) -> AquilaTokenizer:
    return AquilaTokenizer.from_pretrained(str(write_sentencepiece_tokenizer(folder)))


def newer_sentencepiece(folder) -> AquilaTokenizer:
    """One that puts a space in front of the whole text only."""
    write_sentencepiece_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    return AquilaTokenizer.from_pretrained(str(folder))


def gguf(folder) -> AquilaTokenizer:
    """The tiny vocabulary out of a GGUF file, with the special tokens as control tokens."""
    from gguf import GGUFWriter

    vocab = json.loads((write_aquila_tokenizer(folder) / "vocab.json").read_text())
    words = [token for token in sorted(vocab, key=vocab.get) if token not in SPECIALS]
    writer = GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*words, *SPECIALS])
    writer.add_token_types([1] * len(words) + [3] * len(SPECIALS))
    writer.add_token_merges((folder / "merges.txt").read_text().splitlines()[1:])
    writer.add_eos_token_id(len(words) + SPECIALS.index("</s>"))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    return AquilaTokenizer.from_pretrained(str(folder / "model.gguf"))


KINDS = (aquila, borderless, trimming, sentencepiece, newer_sentencepiece, gguf)
MADE: dict[object, AquilaTokenizer] = {}
CASES = [
    (kind, name)
    for kind in KINDS
    for name in TEMPLATES
    if kind not in (sentencepiece, newer_sentencepiece) or name in ("ziya", "aquila", "aquila-legacy", "aquila-chat")
]


@pytest.fixture(scope="module")
def prompts_of(tmp_path_factory):
    def made(kind, name: str) -> ChatPrompts:
        if kind not in MADE:
            MADE[kind] = kind(tmp_path_factory.mktemp(kind.__name__))
        return ChatPrompts(MADE[kind], name)

    return made


# ------------------------------------------------------------------------- which bytes of a text a token writes


def byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies spell bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = byte_letters()


def spelled(tokenizer: AquilaTokenizer, token_id: int) -> tuple[bytes, bool]:
    """The bytes of a token, and whether it is a special one."""
    token = tokenizer.backend.id_to_token(token_id)
    if token_id in tokenizer.added_tokens_decoder:
        return token.encode(), True
    if tokenizer.backend.normalizer is None and not is_sentencepiece(tokenizer):
        return bytes(LETTERS[letter] for letter in token), False
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)]), False
    return token.replace("▁", " ").encode(), False


def is_sentencepiece(tokenizer: AquilaTokenizer) -> bool:
    return tokenizer.backend.token_to_id("<0x0A>") is not None


def byte_spans(tokenizer: AquilaTokenizer, ids: list[int], text: bytes) -> list[tuple[int, int]]:
    """Where each token stands among the bytes of a text. A space that the tokenizer puts in front counts as a part of
    the character behind it; the ids in front of a text have (0, 0)."""
    legacy = tokenizer.backend.normalizer is not None and "Prepend" in str(tokenizer.backend.normalizer)
    prefix = len(tokenizer._prefix)
    spans, at = [(0, 0)] * prefix, 0
    begins = is_sentencepiece(tokenizer) and (legacy or text[:1] != b" ")
    for token_id in ids[prefix:]:
        written, is_special = spelled(tokenizer, token_id)
        start = at
        if begins and not is_special:
            assert written.startswith(b" "), "a stretch begins with a space that the text has not"
            written = written[1:]
        at += len(written)
        assert text[start:at] == written
        # the lone space in front: with the first character
        spans.append((start, at if at > start else start + len(text[start:].decode()[:1].encode())))
        begins = legacy and is_special
    assert at == len(text)
    return spans


def learned(pieces: list[Piece]) -> np.ndarray:
    """Which bytes of the text are learned."""
    return np.repeat([piece.is_target for piece in pieces], [len(piece.text.encode()) for piece in pieces])


def without_eos(prompts: ChatPrompts, sample: Sample, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """The sample without the eos that only "ziya" puts behind an answer at the end."""
    assert sample.ids.dtype == np.int32 and sample.is_target.dtype == np.bool_
    ids, is_target = sample.ids.tolist(), sample.is_target.tolist()
    if prompts.name == "ziya" and messages[-1]["role"] == "assistant":
        assert (ids.pop(), is_target.pop()) == (prompts.tokenizer.eos_token_id, True)
    return ids, is_target


def check(prompts: ChatPrompts, messages: list[dict]) -> tuple[list[int], list[bool], list[Piece]]:
    """The three promises for one conversation; returns ids, what is learned of them, and the pieces."""
    tokenizer = prompts.tokenizer
    pieces = prompts.pieces(messages, add_generation_prompt=False)
    ids, is_target = without_eos(prompts, encode_conversation(prompts, messages), messages)
    assert ids == tokenizer.encode_pieces(pieces)

    text = "".join(piece.text for piece in pieces).encode()
    is_learned = learned(pieces)
    spans = byte_spans(tokenizer, ids, text)
    # A character of several tokens is learned as a whole: borders of pieces lie between characters.
    assert is_target == [bool(is_learned[begin:end].any()) for begin, end in spans]

    # All of every answer is in learned tokens, and of other text only what shares a token with an end of one.
    covered = np.zeros(len(text), dtype=bool)
    crossing = set()
    for span in (span for span, key in zip(spans, is_target, strict=True) if key):
        covered[slice(*span)] = True
        crossing |= {span} if not is_learned[slice(*span)].all() else set()
    ends = np.count_nonzero(np.diff(np.concatenate([[0], is_learned, [0]])))
    assert covered[is_learned].all() and len(crossing) <= ends
    return ids, is_target, pieces


# ------------------------------------------------------------------------------------------------- the promises


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda case: getattr(case, "__name__", case))
@given(contents=st.lists(TEXT, min_size=2, max_size=6), system=st.none() | TEXT)
@settings(max_examples=30, deadline=None)
def test_ids_are_those_of_the_whole_text_and_answers_are_learned(prompts_of, kind, name, contents, system):
    prompts = prompts_of(kind, name)
    check(prompts, talk(*contents, system=system if TEMPLATES[name].system else None))


@pytest.fixture(scope="module")
def real() -> AquilaTokenizer:
    folder = SHARED / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}: this test did not run")
    return AquilaTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chatml"])
@given(contents=st.lists(TEXT, min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_same_with_aquilas_own_vocabulary(real, name, contents):
    check(ChatPrompts(real, name), talk(*contents))


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_merges_over_borders_decoding_gives_every_answer_with_its_separator(prompts_of, name):
    prompts = prompts_of(aquila, name)
    contents = ("who are you?", "I am 🙂, 你好", "and </s> ### Human: ?", "<|endofpiece|> no\n")
    template = TEMPLATES[name]
    ids, is_target, pieces = check(prompts, talk(*contents))
    runs = [[i for i, _ in run] for key, run in groupby(zip(ids, is_target, strict=True), lambda pair: pair[1]) if key]
    wanted = [template.assistant.begin + template.harmless(text) + template.assistant.end for text in contents[1::2]]
    assert [prompts.tokenizer.decode(run) for run in runs] == wanted
    rest = prompts.tokenizer.decode([i for i, key in zip(ids, is_target, strict=True) if not key])
    assert rest == "".join(piece.text for piece in pieces if not piece.is_target)


def test_a_merge_over_a_border_is_learned_whole(real):
    ids, is_target, _ = check(ChatPrompts(real, "aquila-legacy"), talk("Hi", "Hello"))
    tokens = [real.decode([i]) for i, key in zip(ids, is_target, strict=True) if key]
    assert tokens == [" Hello", "</s>"]  # the space is the header's, "### Assistant: "


def test_words_that_spell_special_tokens_are_learned_as_words(prompts_of):
    prompts = prompts_of(aquila, "aquila-v1")
    ids, is_target, _ = check(prompts, talk("say </s>", "</s> and <|startofpiece|>🙂</s>"))
    eos = prompts.tokenizer.eos_token_id
    assert ids.count(eos) == 1 and ids[-1] == eos and is_target[-1]
    assert is_target.index(True) == ids.index(prompts.tokenizer.convert_tokens_to_ids("<|endofpiece|>")) + 1


@pytest.mark.parametrize("kind", [aquila, borderless])
def test_every_answer_is_learned_and_no_question(prompts_of, kind):
    prompts = prompts_of(kind, "aquila")
    sample = encode_conversation(prompts, talk("q1", "a1", "q2", "a2", "q3", ""))
    assert sample.is_target.sum() >= sample.ids.tolist().count(prompts.tokenizer.eos_token_id) == 3
    only_asked = encode_conversation(prompts, talk("q1"))
    assert not only_asked.is_target.any() and only_asked.labels == 0


def test_control_encoding_piece_by_piece_gives_other_ids(prompts_of):
    prompts = prompts_of(borderless, "aquila-chat")
    pieces = prompts.pieces(talk("hello, who", "Hello."), add_generation_prompt=False)
    apart = [i for piece in pieces for i in prompts.tokenizer.backend.encode(piece.text).ids]
    whole = encode_conversation(prompts, talk("hello, who", "Hello.")).ids.tolist()
    assert apart != whole and prompts.tokenizer.decode(apart) == prompts.tokenizer.decode(whole)


def test_control_piece_by_piece_differs_with_aquilas_vocabulary_too(real):
    prompts = ChatPrompts(real, "aquila-legacy")
    pieces = prompts.pieces(talk("Hi", "Hello"), add_generation_prompt=False)
    apart = [i for piece in pieces for i in real.encode_pieces([piece])]
    assert apart != encode_conversation(prompts, talk("Hi", "Hello")).ids.tolist()


@pytest.mark.parametrize("shift", [-1, 1])
def test_control_spans_that_are_off_by_one_are_noticed(prompts_of, shift, monkeypatch):
    prompts = prompts_of(aquila, "aquila-chat")
    good = AquilaTokenizer.encode_pieces_with_spans

    def shifted(self, pieces):
        found = good(self, pieces)
        end = sum(len(piece.text) for piece in pieces)
        moved = [(min(max(b + shift, 0), end), min(max(e + shift, 0), end)) for b, e in found.spans]
        return found._replace(spans=moved)

    monkeypatch.setattr(AquilaTokenizer, "encode_pieces_with_spans", shifted)
    with pytest.raises(AssertionError):
        check(prompts, talk("who?", "me", "ok", "yes"))


# ------------------------------------------------------------------------------------------------ ends of answers


@pytest.mark.parametrize("kind", [sentencepiece, newer_sentencepiece, aquila])
def test_ziya_ends_its_last_answer_with_eos_and_learns_that(prompts_of, kind):
    prompts = prompts_of(kind, "ziya")
    sample = encode_conversation(prompts, talk("q", "a", "q", "b"))
    eos = prompts.tokenizer.eos_token_id
    assert sample.ids.tolist().count(eos) == 1 and sample.ids[-1] == eos and sample.is_target[-1]
    assert encode_conversation(prompts, talk("q", "a", "q")).ids[-1] != eos  # the last message is no answer


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "ziya"])
def test_other_templates_end_with_what_they_write(prompts_of, name):
    prompts = prompts_of(aquila, name)
    pieces = prompts.pieces(talk("q", "a"), add_generation_prompt=False)
    assert encode_conversation(prompts, talk("q", "a")).ids.tolist() == prompts.tokenizer.encode_pieces(pieces)


def test_a_tokenizer_without_eos_cannot_end_ziyas_answers(prompts_of):
    tokenizer = copy.deepcopy(prompts_of(aquila, "ziya").tokenizer)
    tokenizer._eos_token = None
    with pytest.raises(ConfigError, match="names no eos_token"):
        encode_conversation(ChatPrompts(tokenizer, "ziya"), talk("q", "a"))


def with_jinja(tokenizer: AquilaTokenizer, jinja: str) -> ChatPrompts:
    made = copy.deepcopy(tokenizer)
    made.init_chat_template(jinja)
    return ChatPrompts(made)


def test_a_foreign_template_that_ends_with_a_special_token_is_taken_as_it_is(prompts_of):
    jinja = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    prompts = with_jinja(prompts_of(aquila, "aquila").tokenizer, jinja)
    sample = encode_conversation(prompts, talk("q1", "a1 </s>", "q2", "🙂"))
    text = [prompts.tokenizer.decode([i for i, _ in run]) for key, run in _runs(sample) if key]
    assert text == ["a1 </s><|im_end|>", "🙂<|im_end|>"]
    assert prompts.tokenizer.decode(sample.ids[-1:]) == "\n" and not sample.is_target[-1]


def test_a_foreign_template_that_ends_with_words_gets_eos_right_behind_the_answer(prompts_of):
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }} END\n{% endfor %}"
    prompts = with_jinja(prompts_of(aquila, "aquila").tokenizer, jinja)
    sample = encode_conversation(prompts, talk("q1", "a1", "q2", "a2"))
    assert prompts.tokenizer.decode(sample.ids).endswith("assistant: a2</s>")
    text = [prompts.tokenizer.decode([i for i, _ in run]) for key, run in _runs(sample) if key]
    assert [answer.strip() for answer in text] == ["a1", "a2</s>"]


def test_a_foreign_template_whose_answers_cannot_be_found_gives_no_label(prompts_of):
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}</s>{% endfor %}"
    prompts = with_jinja(prompts_of(aquila, "aquila").tokenizer, jinja)
    sample = encode_conversation(prompts, talk("q1", "a1"))
    assert sample.labels == 0 or prompts.tokenizer.decode(sample.ids[sample.is_target]) == "</s>"


def _runs(sample: Sample):
    pairs = zip(sample.ids.tolist(), sample.is_target.tolist(), strict=True)
    return [(key, list(run)) for key, run in groupby(pairs, lambda pair: pair[1])]


# ------------------------------------------------------------------------------------------------ spans


def test_spans_of_pieces_are_those_of_their_text(prompts_of):
    tokenizer = prompts_of(aquila, "aquila").tokenizer
    for pieces in (
        [Piece("Human: ", False, False), Piece("a</s>🙂 b", True, True), Piece("</s>", True, False)],
        [Piece("Human: ", False, False), Piece("a🙂 b", True, True), Piece("</s>", True, False)],
    ):
        text = "".join(piece.text for piece in pieces)
        ids, spans = tokenizer.encode_pieces_with_spans(pieces)
        assert ids == tokenizer.encode_pieces(pieces) and len(ids) == len(spans)
        assert all(end == begin or begin >= last_begin for (last_begin, _), (begin, end) in pairwise(spans))
        assert {place for begin, end in spans for place in range(begin, end)} == set(range(len(text)))
        smile = text.index("🙂")
        assert spans.count((smile, smile + 1)) >= 1
        assert text[slice(*spans[-1])] == "</s>"


@pytest.mark.parametrize("words", ["x", "x<l> <r>"])
def test_white_space_that_a_special_token_swallows_is_not_its_own(prompts_of, words):
    tokenizer = copy.deepcopy(prompts_of(aquila, "aquila").tokenizer)
    tokenizer.backend.add_special_tokens(
        [AddedToken("<l>", lstrip=True, normalized=False), AddedToken("<r>", rstrip=True, normalized=False)]
    )
    tokenizer._note_added_tokens()
    pieces = [
        Piece("a<r>", False, False),
        Piece(" \n", True, False),
        Piece(words, True, True),
        Piece(" <l>", False, False),
    ]
    ids, spans = tokenizer.encode_pieces_with_spans(pieces)
    assert ids == tokenizer.encode_pieces(pieces)
    text = "".join(piece.text for piece in pieces)
    left, right = map(tokenizer.backend.token_to_id, ("<l>", "<r>"))
    assert text[slice(*spans[ids.index(right)])] == "<r>" and text[slice(*spans[ids.index(left)])] == "<l>"
    is_target = targets_of(pieces, spans)
    assert not is_target[ids.index(right)] and not is_target[ids.index(left)]


def test_a_trimming_post_processor_does_not_lose_white_space(prompts_of):
    tokenizer = prompts_of(trimming, "aquila").tokenizer
    assert tokenizer.get_offset_mapping("x  ") != [(0, 1), (1, 3)]  # the control: it does trim
    _, spans = tokenizer.encode_pieces_with_spans([Piece("x", False, False), Piece("  ", True, True)])
    assert {place for begin, end in spans for place in range(begin, end)} == {0, 1, 2}


def test_a_pair_of_surrogates_is_one_character_of_two_places(prompts_of):
    tokenizer = copy.deepcopy(prompts_of(aquila, "aquila").tokenizer)
    tokenizer.surrogates = "replace"
    pieces = [
        Piece("q\ud83d\ude42\ud83d\ude42", False, True),
        Piece("a\ud83d\ude42b", True, True),
        Piece("</s>c", False, False),
    ]
    ids, spans = tokenizer.encode_pieces_with_spans(pieces)
    is_target = targets_of(pieces, spans)
    assert tokenizer.decode([i for i, key in zip(ids, is_target, strict=True) if key]) == "a🙂b"


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_written_or_spelled_is_an_error(prompts_of):
    with pytest.raises(ChatError, match="has the role"):
        encode_conversation(prompts_of(aquila, "aquila"), [{"role": "tool", "content": "x"}])
    with pytest.raises(TokenizerError, match="surrogate"):
        encode_conversation(prompts_of(aquila, "aquila"), talk("q", "\ud83d"))


def test_which_templates_know_a_system_message(prompts_of):
    without = {name for name in TEMPLATES if not knows_system(prompts_of(aquila, name))}
    assert without == {name for name, template in TEMPLATES.items() if template.system is None} == {"aquila-v1", "ziya"}
    tokenizer = prompts_of(aquila, "aquila").tokenizer
    silent = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    assert not knows_system(with_jinja(tokenizer, silent))
    assert knows_system(with_jinja(tokenizer, "{% for m in messages %}{{ m.content }}</s>{% endfor %}"))


# ------------------------------------------------------------------------------------------------ upstream


def test_where_upstream_empties_samples_ours_are_learned(real, shared):
    """Information beside our truth: upstream's labels are another tokenization's, and often nothing."""
    rows = json.loads((shared / "tokenizer" / "sft_golden_dev.json").read_text())
    emptied = 0
    for row in rows:
        contents = [text for turn in row["chat"] for text in turn]
        sample = encode_conversation(ChatPrompts(real, row["template"]), talk(*contents))
        assert sample.labels > 0
        emptied += row["template"] == "aquila-legacy" and row["trained_tokens"] == 0
        length = sum(i != 0 for i in row["input_ids"])
        if row["template"] in ("aquila-v1", "aquila") and row["input_ids"][:length] == sample.ids.tolist():
            theirs = {i for i, label in enumerate(row["labels_upstream"][:length]) if label != -100}
            assert theirs <= set(np.flatnonzero(sample.is_target).tolist()) or row["trained_tokens"] == 0
    assert emptied >= 7
