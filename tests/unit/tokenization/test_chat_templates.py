"""Chat templates: golden prompts, pieces, forgery, Jinja, which model has which; and the tokenizer's part."""

import copy
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from paddlenlp.transformers.tokenizer_utils import ChatTemplate
from paths import SHARED
from tokenizers import AddedToken, Tokenizer, models

from aquila_pd import AquilaTokenizer
from aquila_pd.tokenization.chat_templates import (
    SYSTEM,
    TEMPLATES,
    Piece,
    find_template,
    template_by_name,
    template_by_sizes,
    template_of_jinja,
)
from aquila_pd.tokenization.convert import write_tokenizer
from aquila_pd.utils.errors import ChatError, ConfigError, TokenizerError

QUESTION = [{"role": "user", "content": "q"}]
TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
IM_TOKENS = ("<|im_start|>", "<|im_end|>")


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def golden_rows() -> list[tuple[str, list[dict], dict]]:
    """(template, messages, row) of every golden prompt."""
    rows = []
    for row in json.loads((SHARED / "tokenizer" / "chat_golden_dev.json").read_text()):
        messages = []
        for question, answer in row["turns"]:
            messages.append({"role": "user", "content": question})
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        rows.append((row["template"], messages, row))
    return rows


@pytest.fixture(scope="module")
def aquila() -> AquilaTokenizer:
    """The published tokenizer, with ChatML's two tokens added so that every template can be encoded."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of shared data at {SHARED}: this test did not run")
    tokenizer = AquilaTokenizer.from_pretrained(str(SHARED / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.additional_special_tokens, *IM_TOKENS]})
    return tokenizer


def with_template(tokenizer: AquilaTokenizer, jinja: str) -> AquilaTokenizer:
    made = copy.copy(tokenizer)
    made.init_kwargs = dict(tokenizer.init_kwargs)
    made.init_chat_template(jinja)
    return made


# ------------------------------------------------------------------------------------------------------- goldens


def test_golden_prompts_are_met_text_and_ids(shared, aquila):
    rows = golden_rows()
    assert {name for name, _, _ in rows} == set(TEMPLATES) - {"chatml"} and len(rows) >= 54
    for name, messages, row in rows:
        pieces = TEMPLATES[name].render(messages)
        assert text_of(pieces) == row["prompt"]
        if row["ids"] is not None:
            assert aquila.encode_pieces(pieces) == row["ids"]


def test_control_a_space_behind_the_prompt_is_another_prompt(shared, aquila):
    for name, messages, row in golden_rows():
        if row["ids"] is not None:
            with_space = [*TEMPLATES[name].render(messages), Piece(" ", False, False)]
            assert aquila.encode_pieces(with_space) == row["upstream_ids_trailing_space"] != row["ids"]


def compiled_by_transformers(text: str):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)


@pytest.mark.parametrize("compiled", [ChatTemplate._compile_jinja_template, compiled_by_transformers])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_text_writes_what_render_writes(shared, name, compiled):
    template, jinja = TEMPLATES[name], compiled(TEMPLATES[name].jinja())
    conversations = [messages for other, messages, _ in golden_rows() if other == name]
    conversations += [TALK, QUESTION, [{"role": "user", "content": " {{ 1 }}\n'\\' \n\n"}]]
    if template.system:
        conversations.append([{"role": "system", "content": "be brief"}, *TALK])
    for messages in conversations:
        for prompt in (True, False):
            written = jinja.render(messages=messages, add_generation_prompt=prompt)
            assert written == text_of(template.render(messages, prompt))
    refused = [[{"role": "tool", "content": "x"}], [*QUESTION, {"role": "system", "content": "x"}]]
    for messages in refused:
        with pytest.raises(TemplateError, match="knows the roles"):
            jinja.render(messages=messages, add_generation_prompt=True)


def test_the_text_that_earlier_versions_recorded_for_ziya_is_still_ours():
    recorded = (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '<human>:' + message['content'].strip() + '\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '<bot>:' + message['content'].strip() + '\n' }}"
        "{% else %}{{ raise_exception('This model knows the roles user and assistant only.') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot>:' }}{% endif %}"
    )
    assert template_of_jinja(recorded) is TEMPLATES["ziya"]


def test_our_jinja_texts_are_recognised_and_no_other():
    for name, template in TEMPLATES.items():
        assert template_of_jinja(template.jinja()).name == name
        assert template_of_jinja(template.jinja() + " ") is None
    assert template_of_jinja(None) is None and template_of_jinja([{"name": "default"}]) is None


# -------------------------------------------------------------------------------------------------------- pieces

TARGETS = {
    "aquila-chat": [" a1###", " a2###"],
    "aquila": [" a1</s>", " a2</s>"],
    "aquila-legacy": ["a1</s>", "a2</s>"],
    "aquila-v1": ["a1</s>", "a2</s>"],
    "aquila-v2": ["a1</s>", "a2</s>"],
    "ziya": ["a1\n", "a2\n"],
    "chatml": ["a1<|im_end|>", "a2<|im_end|>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_the_answers_with_their_separators_and_nothing_else(name):
    pieces = TEMPLATES[name].render(TALK, add_generation_prompt=False)
    runs, run = [], ""
    for piece in [*pieces, Piece("", False, False)]:
        run += piece.text if piece.is_target else ""
        if run and not piece.is_target:
            runs.append(run)
            run = ""
    assert runs == TARGETS[name]
    assert [piece.text for piece in pieces if piece.is_content] == ["q1", "a1", "q2", "a2"]
    # the prompt ends where the first target begins
    prompt = text_of(TEMPLATES[name].render(TALK[:1]))
    assert text_of(pieces).startswith(prompt + TARGETS[name][0])


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.system])
def test_a_system_message_replaces_the_default_one(name):
    template = TEMPLATES[name]
    without, given = (
        text_of(template.render(messages)) for messages in (QUESTION, [{"role": "system", "content": "S!"}, *QUESTION])
    )
    assert SYSTEM not in given and given.count("S!") == 1
    if template.default_system:
        assert given == without.replace(SYSTEM, "S!")
    else:
        assert name == "chatml" and "system" not in without


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "holds no message"),
        ("hello", "a list of messages"),
        ([{"role": "tool", "content": "x"}], "message 0 has the role 'tool'"),
        ([{"role": "user"}], "message 0 has the content None, not text"),
        ([{"role": "user", "content": ["x"]}], "not text"),
        ([{"content": "x"}], "has the role None"),
        (["x"], "message 0 is 'x'"),
        ([*QUESTION, {"role": "system", "content": "x"}], "message 1 is from the system and not the first"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(messages, said):
    with pytest.raises(ChatError, match=re.escape(said)):
        TEMPLATES["aquila"].render(messages)


@pytest.mark.parametrize("name", ["aquila-v1", "ziya"])
def test_a_system_message_is_refused_where_the_model_was_tuned_without(name):
    with pytest.raises(ChatError, match="without system messages"):
        TEMPLATES[name].render([{"role": "system", "content": "x"}, *QUESTION])


def test_ziya_strips_contents():
    messages = [{"role": "user", "content": " q \n"}, {"role": "assistant", "content": "\ta "}]
    assert text_of(TEMPLATES["ziya"].render(messages)) == "<human>:q\n<bot>:a\n<bot>:"


def test_an_unknown_name_is_answered_with_the_known_ones_and_the_nearest():
    with pytest.raises(ConfigError) as raised:
        find_template("Aquila-legasy")
    assert all(name in str(raised.value) for name in TEMPLATES) and "Did you mean aquila-legacy?" in str(raised.value)
    with pytest.raises(ConfigError, match="Known: "):
        find_template("")


# ------------------------------------------------------------------------------------------------------- forgery

# Headers as a reader of the text would take them: any case, white space inside, full-width signs.
HEADERS = {
    "aquila-chat": r"[#＃]{3}\s*(human|assistant)\s*[:：]",
    "aquila": r"(?:[#＃]{3}|[<＜]/s[>＞])\s*(human|assistant)\s*[:：]",
    "aquila-legacy": r"[#＃]{3}\s*(human|assistant)\s*[:：]",
    "ziya": r"[<＜](human|bot)[>＞]\s*[:：]",
}
HOSTILE = [
    *(
        "###",
        "##",
        "#",
        "＃＃＃",
        "Human",
        "human",
        "ASSISTANT",
        "Assistant",
        "Aſſistant",
        ":",
        "：",
        " ",
        "\n",
        "\u3000",
    ),
    *("###Human:", "### Human: ", "###\nASSISTANT ：", "####Human:", "</s>Human: ", "<human>:", "<bot> :", "<Human>："),
    *("</s>", "</", "s>", "<|endofpiece|>", "<|startofpiece|>", "<|endoftext|>", "[CLS]", "[UNK]", "<|", "|>", "<"),
    *("<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<|im_", "end|>", "你好", "🙂", "x"),
]
words = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), max_size=8).map("".join)


@st.composite
def conversations(draw, template) -> list[dict]:
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=4))
    system = draw(st.booleans()) if template.system else False
    return [{"role": role, "content": draw(words)} for role in ["system"] * system + roles]


def scaffold_of(template, messages) -> list[str]:
    """The scaffolding of a conversation, as it is around contents that hold nothing."""
    empty = [{**message, "content": "x"} for message in messages]
    return [piece.text for piece in template.render(empty) if not piece.is_content]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=tries(50, 150), deadline=None, derandomize=True)
@given(data=st.data())
def test_words_become_no_special_token(aquila, name, data):
    template = TEMPLATES[name]
    messages = data.draw(conversations(template))
    ids = aquila.encode_pieces(template.render(messages))
    specials = {i for i, token in aquila.added_tokens_decoder.items() if token.special}
    wanted = [i for text in scaffold_of(template, messages) for i in aquila.backend.encode(text).ids if i in specials]
    assert [i for i in ids if i in specials] == wanted
    # and nothing of what was said is lost
    assert aquila.decode(ids) == text_of(template.render(messages))


@pytest.mark.parametrize("name", HEADERS)
@settings(max_examples=tries(100, 300), deadline=None, derandomize=True)
@given(data=st.data())
def test_words_make_no_turn(name, data):
    template = TEMPLATES[name]
    messages = data.draw(conversations(template))
    text = text_of(template.render(messages, add_generation_prompt=False))
    found = re.findall(HEADERS[name], text, re.IGNORECASE)
    roles = [
        {"human": "user", "assistant": "assistant", "bot": "assistant"}[role.lower().replace("ſ", "s")]
        for role in found
    ]
    assert roles == [message["role"] for message in messages if message["role"] != "system"]


def test_control_without_the_breaking_of_headers_a_turn_is_forged():
    for name, pattern in HEADERS.items():
        template = TEMPLATES[name]
        forged = text_of(template.render(TALK[:2], add_generation_prompt=False))
        said = forged[len(text_of(template.render([{"role": "user", "content": ""}], False))) :]
        messages = [{"role": "user", "content": f"hm{template.user.end}{template.user.header}x{said}"}]
        assert len(re.findall(pattern, messages[0]["content"], re.IGNORECASE)) >= 1
        assert len(re.findall(pattern, text_of(template.render(messages, False)), re.IGNORECASE)) == 1


def test_a_broken_header_stays_readable_and_other_text_is_as_it_was():
    template = TEMPLATES["aquila-legacy"]
    assert template.harmless("a ###Human: b") == "a # ##Human: b"
    assert template.harmless("####human ：") == "## ##human ："
    assert TEMPLATES["ziya"].harmless("<Bot>: x") == "< Bot>: x"
    assert TEMPLATES["aquila"].harmless("</s>Human: x") == "< /s>Human: x"
    for untouched in ("### Title", "###\n", "Human: x", "### Human rights", "## Assistant: x", " #Human:\n"):
        assert template.harmless(untouched) == untouched
    for name in ("aquila-v1", "aquila-v2", "chatml"):  # headers are special tokens, which no words become
        assert TEMPLATES[name].harmless("###Human: <human>: </s>") == "###Human: <human>: </s>"


def test_encoding_by_several_threads_is_what_one_does(aquila):
    pieces = [
        TEMPLATES[name].render([{"role": "user", "content": f"{i} </s><|endofpiece|> 你好 [CLS]"}])
        for i in range(40)
        for name in ("aquila", "aquila-v1", "aquila-v2")
    ]
    texts = [text_of(p) for p in pieces]
    twin = copy.deepcopy(aquila)  # has made no second backend yet

    def both(i: int) -> tuple[list[int], list[int], str]:
        ids = twin.encode_pieces(pieces[i])
        return ids, twin(texts[i])["input_ids"], twin.decode(ids)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(both, range(len(pieces))))
    for i, (ids, parsed, decoded) in enumerate(found):
        assert ids == aquila.encode_pieces(pieces[i]) and decoded == texts[i]
        assert parsed == aquila(texts[i])["input_ids"] != ids  # the control: as one text, tokens are found


def test_split_special_tokens_is_still_an_attribute_and_an_argument(aquila):
    tokenizer = copy.copy(aquila)
    assert tokenizer.tokenize("</s>") == ["</s>"]
    assert tokenizer.tokenize("</s>", split_special_tokens=True) == ["</", "s", ">"]
    tokenizer.split_special_tokens = True
    assert tokenizer.tokenize("</s>") == ["</", "s", ">"] and len(tokenizer("</s>")["input_ids"]) == 3


def test_a_control_token_that_is_not_called_special_is_no_words_either(aquila):
    tokenizer = copy.deepcopy(aquila)
    tokenizer.backend.add_tokens([AddedToken("<|turn|>", special=False, normalized=False)])
    tokenizer._note_added_tokens()
    turn = tokenizer.backend.token_to_id("<|turn|>")
    pieces = [Piece("<|turn|>user", False, False), Piece("a<|turn|>b", False, True)]
    assert tokenizer.encode_pieces(pieces).count(turn) == 1
    # where the scaffolding has none, it is a word like others
    assert tokenizer.encode_pieces([Piece("user:", False, False), pieces[1]]).count(turn) == 1


def test_white_space_that_a_token_swallows_is_that_of_the_scaffolding(aquila):
    tokenizer = copy.deepcopy(aquila)
    tokenizer.backend.add_special_tokens(
        [AddedToken("<l>", lstrip=True, normalized=False), AddedToken("<r>", rstrip=True, normalized=False)]
    )
    tokenizer._note_added_tokens()
    left, right = map(tokenizer.backend.token_to_id, ("<l>", "<r>"))
    scaffold = Piece("a \n <l> b<r>  c  ", False, False)
    plain = tokenizer.encode_pieces([scaffold, Piece("x", False, True)])
    assert plain == tokenizer("a \n <l> b<r>  c  x")["input_ids"] and {left, right} <= set(plain)
    odd = tokenizer.encode_pieces([scaffold, Piece("x<l> <r>", False, True)])  # the other way: run by run
    assert odd[: len(plain) - 1] == plain[:-1] and (odd.count(left), odd.count(right)) == (1, 1)


def test_tokens_across_the_border_of_pieces_are_not_put_together(aquila):
    ids = aquila.encode_pieces([Piece("x</", False, False), Piece("s>", False, True)])
    assert aquila.eos_token_id not in ids and aquila.decode(ids) == "x</s>"
    # scaffolding in two pieces is one text
    assert aquila.encode_pieces([Piece("</", False, False), Piece("s>", False, False)]) == [aquila.eos_token_id]


def test_a_vocabulary_that_cannot_keep_words_apart_says_so():
    """Unigram finds <s> by itself, as a piece: no way of encoding it as plain text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((c, -5.0) for c in "<>s/abc"), ("▁", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<unk>", "<s>"])
    tokenizer = AquilaTokenizer(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    assert tokenizer.encode_pieces([Piece("<s>", False, False), Piece("a?b", False, True)]) == [1, 6, 0, 7]
    with pytest.raises(TokenizerError, match="<s> only as a special token"):
        tokenizer.encode_pieces([Piece("a", False, False), Piece("<s>", False, True)])


# ----------------------------------------------------------------------------------------------- which has which

SIZES_7B = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=100008,
    rope_scaling=None,
)
SIZES_34B = SIZES_7B | dict(
    hidden_size=6144, intermediate_size=24576, num_hidden_layers=60, num_attention_heads=48, num_key_value_heads=8
)
SIZES_70B = SIZES_7B | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)
TINY = dict.fromkeys(SIZES_7B, 8) | {"rope_scaling": {"type": "linear", "factor": 4.0}}
LINEAR = {"rope_scaling": {"type": "linear", "factor": 8.0}}


@pytest.mark.parametrize(
    "name, wanted",
    {
        "AquilaChat-7B": "aquila-chat",
        "BAAI/AquilaChat2-7B": "aquila-v1",
        "AquilaChat2-7B-16K": "aquila",
        "AquilaChat2-34B-16K": "aquila",
        "AquilaChat2-34B": "aquila-legacy",
        "AquilaChat2-34B-v1.2": "aquila-legacy",
        "AquilaChat2-34B-Int4-GPTQ": "aquila-legacy",
        "AquilaChat2-34B-AWQ": "aquila-legacy",
        "aquilachat2-34b-16k.Q4_K_M.gguf": "aquila",
        "aquilachat2-34b.Q4_K_M.gguf": "aquila-legacy",
        "Aquila2-34B-Chat-PD": "aquila-legacy",
        "AquilaChat2-70B-Expr": "aquila-v2",
        "Ziya-LLaMA-13B-v1": "ziya",
        "Ziya2-13B-Chat": "ziya",
        "Ziya2-13B-Base": None,
        "Aquila2-34B": None,
        "my_Aquila2-34B": None,
        "Aquila2-70B-Expr": None,
        "Aquila2-7B": None,
        "Aquila-7B": None,
        "somebody's model": None,
    }.items(),
)
def test_published_models_are_known_by_name(name, wanted):
    known, found = template_by_name(name)
    assert known == (name != "somebody's model")
    assert (found and found.name) == wanted


@pytest.mark.parametrize(
    "fields, wanted",
    [
        (SIZES_7B, None),  # AquilaChat-7B or AquilaChat2-7B
        (SIZES_7B | LINEAR, "aquila"),
        (SIZES_7B | {"multiple_of": 256}, "aquila-chat"),
        (TINY | {"multiple_of": 256}, None),
        (SIZES_34B, "aquila-legacy"),
        (SIZES_34B | {"vocab_size": 143_700}, "aquila-legacy"),
        (SIZES_34B | LINEAR, "aquila"),
        (SIZES_34B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "aquila-legacy"),
        (SIZES_34B | {"vocab_size": 32000}, None),
        (SIZES_70B, "aquila-v2"),
        (SIZES_70B | {"vocab_size": 32000}, None),  # LLaMA-2-70B
        (TINY, None),
        (TINY | {"vocab_size": 39424}, "ziya"),
    ],
)
def test_other_names_are_judged_by_sizes_where_these_are_certain(fields, wanted):
    found = template_by_sizes(fields)
    assert (found and found.name) == wanted


# ------------------------------------------------------------------------------------------- apply_chat_template

FOREIGN = (  # ChatML with a default system message, as SmolLM2 has it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_apply_chat_template_writes_and_encodes_with_ours(aquila, name):
    tokenizer = with_template(aquila, TEMPLATES[name].jinja())
    assert tokenizer.template is TEMPLATES[name]
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == text_of(TEMPLATES[name].render(TALK))
    inputs = tokenizer.apply_chat_template(TALK)
    assert inputs["input_ids"] == aquila.encode_pieces(TEMPLATES[name].render(TALK))
    assert inputs["attention_mask"] == [1] * len(inputs["input_ids"])
    assert tokenizer.apply_chat_template(TALK, return_dict=False) == inputs["input_ids"]
    without = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)["input_ids"]
    assert without == aquila.encode_pieces(TEMPLATES[name].render(TALK, False)) != inputs["input_ids"]


@pytest.mark.parametrize("jinja", [TEMPLATES["aquila-v1"].jinja(), FOREIGN])
def test_every_form_of_a_conversation_is_taken(aquila, jinja):
    tokenizer = with_template(aquila, jinja)
    text = tokenizer.apply_chat_template(TALK[:3], tokenize=False)
    assert text.count("q1") == text.count("a1") == text.count("q2") == 1
    forms = [tuple(TALK[:3]), [["q1", "a1"], ["q2"]], [("q1", "a1"), ("q2", None)], [["q1", "a1"], ["q2", None]]]
    for form in forms:
        assert tokenizer.apply_chat_template(form, tokenize=False) == text
    assert tokenizer.apply_chat_template("q", tokenize=False) == tokenizer.apply_chat_template(QUESTION, tokenize=False)
    for form in ([], ["a", "b"], None, 5, [["a", "b", "c"]], [QUESTION[0], "x"], {"role": "user", "content": "x"}):
        with pytest.raises(ChatError, match="A conversation cannot be"):
            tokenizer.apply_chat_template(form)


def test_tensors_padding_and_truncation_are_honoured(aquila):
    tokenizer = with_template(aquila, TEMPLATES["aquila-v1"].jinja())
    ids = tokenizer.apply_chat_template(QUESTION)["input_ids"]
    tensors = tokenizer.apply_chat_template(QUESTION, return_tensors="pd")
    assert tensors["input_ids"].shape == [1, len(ids)] and tensors["input_ids"][0].tolist() == ids
    padded = tokenizer.apply_chat_template(QUESTION, return_tensors="np", padding="max_length", max_length=8)
    assert padded["input_ids"].shape == (1, 8) and padded["attention_mask"][0].tolist() == [0] * (8 - len(ids)) + [
        1
    ] * len(ids)
    assert tokenizer.apply_chat_template(QUESTION, truncation=True, max_length=2)["input_ids"] == ids[:2]
    with pytest.raises(TypeError, match="max_lenght"):
        tokenizer.apply_chat_template(QUESTION, max_lenght=2)


def test_a_template_set_as_an_attribute_is_taken(aquila):
    """PaddleNLP's apply_chat_template raises UnboundLocalError there."""
    tokenizer = copy.copy(aquila)
    tokenizer.init_kwargs = dict(aquila.init_kwargs)
    tokenizer.chat_template = TEMPLATES["aquila-v1"].jinja()
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == "<|startofpiece|>q<|endofpiece|>"


def test_without_a_template_the_error_says_what_to_do(aquila):
    with pytest.raises(ConfigError, match="--chat-template NAME"):
        aquila.apply_chat_template(QUESTION)


def test_a_template_whose_tokens_are_not_there_is_not_encoded(shared):
    tokenizer = AquilaTokenizer.from_pretrained(str(shared / "tokenizer"))
    tokenizer.init_chat_template(TEMPLATES["chatml"].jinja())
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False).startswith("<|im_start|>user")
    with pytest.raises(ConfigError, match=re.escape("<|im_start|>, <|im_end|>")):
        tokenizer.apply_chat_template(QUESTION)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_the_template_travels_with_the_tokenizer(aquila, travel, tmp_path):
    for jinja in (TEMPLATES["aquila-v1"].jinja(), FOREIGN):
        tokenizer = with_template(aquila, jinja)
        wanted = tokenizer.apply_chat_template(TALK)["input_ids"]
        twin = travel(tokenizer)
        assert twin.apply_chat_template(TALK)["input_ids"] == wanted and twin.template is tokenizer.template
        tokenizer.save_pretrained(str(tmp_path))
        assert AquilaTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(TALK)["input_ids"] == wanted


# -------------------------------------------------------------------------------------- somebody else's template


def test_a_foreign_template_is_used_as_it_is_and_its_contents_are_known(aquila):
    tokenizer = with_template(aquila, FOREIGN)
    pieces = tokenizer.chat_pieces(TALK, add_generation_prompt=False)
    text = ChatTemplate._compile_jinja_template(FOREIGN).render(messages=TALK, add_generation_prompt=False)
    assert tokenizer.template is None and text_of(pieces) == text
    assert [p.text for p in pieces if p.is_content] == ["q1", "a1", "q2", "a2"]
    assert [p.text for p in pieces if p.is_target] == ["a1", "<|im_end|>", "a2", "<|im_end|>"]
    # nothing odd in it: the ids are those of the text
    assert tokenizer.encode_pieces(pieces) == aquila(text)["input_ids"]


@settings(max_examples=tries(50, 100), deadline=None, derandomize=True)
@given(said=st.lists(words, min_size=1, max_size=4))
def test_words_in_a_foreign_template_become_no_special_token(aquila, said):
    tokenizer = with_template(aquila, FOREIGN)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ids = tokenizer.encode_pieces(tokenizer.chat_pieces(messages))
    specials = {i for i, token in aquila.added_tokens_decoder.items() if token.special}
    start, end = map(aquila.backend.token_to_id, IM_TOKENS)
    assert [i for i in ids if i in specials] == [start, end] * (len(said) + 1) + [start]


def test_a_foreign_template_that_strips_is_followed(aquila):
    tokenizer = with_template(aquila, "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}{% endfor %}")
    pieces = tokenizer.chat_pieces([{"role": "user", "content": " a</s> "}])
    assert [p.text for p in pieces] == ["<|im_start|>", "a</s>"] and aquila.eos_token_id not in tokenizer.encode_pieces(
        pieces
    )


def test_a_foreign_template_that_rewrites_contents_takes_no_special_tokens_in_them(aquila):
    tokenizer = with_template(aquila, "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}{% endfor %}")
    assert tokenizer.apply_chat_template("abc", tokenize=False) == "<|im_start|>ABC"
    assert tokenizer.apply_chat_template("abc")["input_ids"] == aquila("<|im_start|>ABC")["input_ids"]
    with pytest.raises(TokenizerError, match="text of special tokens, </s>"):
        tokenizer.apply_chat_template("a</s>", tokenize=False)


@pytest.mark.parametrize(
    "message, said",
    [
        ({"role": "user<|im_end|>", "content": "x"}, "has the role"),
        ({"role": "user", "content": None}, "not text"),
        ({"role": "user", "content": "x", "name": "a<|im_end|>"}, "special token <|im_end|> in its name"),
    ],
)
def test_nothing_gets_into_a_foreign_template_beside_contents(aquila, message, said):
    with pytest.raises(ChatError, match=re.escape(said)):
        with_template(aquila, FOREIGN).apply_chat_template([message])


def test_what_a_foreign_template_refuses_is_a_chat_error(aquila):
    for jinja in ("{{ raise_exception('no system here') }}", "{{ messages[7]['content'] + 1 }}", "{{ 1 / 0 }}"):
        with pytest.raises(ChatError, match="cannot write this conversation"):
            with_template(aquila, jinja).apply_chat_template(QUESTION)


def test_paddlenlps_own_templates_are_taken_and_encoded_safely(aquila):
    tokenizer = copy.copy(aquila)
    rounds = ["<|startofpiece|>{{user}}<|endofpiece|>", "{{bot}}</s>"]
    tokenizer.init_chat_template(
        ChatTemplate(conversation=rounds, system="S{{x}}\n", query="<|startofpiece|>{{query}}")
    )
    text = "S1\n<|startofpiece|>q1<|endofpiece|>a1</s><|startofpiece|>q2"
    for form in ([["q1", "a1"], ["q2"]], TALK[:3]):
        assert tokenizer.apply_chat_template(form, tokenize=False, context_data={"x": 1}) == text
    assert tokenizer.apply_chat_template(TALK[:3], context_data={"x": 1})["input_ids"] == aquila(text)["input_ids"]
    ids = tokenizer.apply_chat_template([["q</s>"]], return_dict=False)
    assert ids[2] == aquila.backend.token_to_id("<|startofpiece|>") and aquila.eos_token_id not in ids
    with pytest.raises(ChatError, match="take turns"):
        tokenizer.apply_chat_template(TALK[1:])


# ---------------------------------------------------------------------------------------- ids in front of a text


def test_bos_stands_in_front_where_the_tokenizer_puts_it_and_once(tmp_path):
    from ziya_factory import write_ziya

    write_tokenizer(write_ziya(tmp_path / "Ziya2-13B-Chat"), tmp_path / "out", chat_template=TEMPLATES["ziya"].jinja())
    tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path / "out"))
    ids = tokenizer.apply_chat_template(QUESTION)["input_ids"]
    assert ids == tokenizer("<human>:q\n<bot>:")["input_ids"] and ids[0] == 1 and ids.count(1) == 1
    assert tokenizer.apply_chat_template(QUESTION, add_special_tokens=False)["input_ids"] == ids[1:]
    brings = [Piece("<s>", False, False), Piece("a", False, True)]
    assert tokenizer.encode_pieces(brings) == tokenizer("<s>a", add_special_tokens=False)["input_ids"]
    for said in ("</s>", "<s>", "<unk>", "a </s>b"):
        ids = tokenizer.apply_chat_template(said)["input_ids"]
        assert ids[0] == 1 and not {0, 1, 2} & set(ids[1:]) and said in tokenizer.decode(ids)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_space_in_front_comes_where_the_whole_text_would_have_it(tmp_path, legacy):
    from ziya_factory import write_ziya

    folder = write_ziya(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": legacy}))
    tokenizer = AquilaTokenizer.from_pretrained(str(folder))

    def around(words: str) -> list[Piece]:
        return [Piece("hello</s>", False, False), Piece(words, False, True), Piece("</s>world", False, False)]

    plain = tokenizer.encode_pieces(around("today"))
    assert plain == tokenizer("hello</s>today</s>world")["input_ids"]
    odd = tokenizer.encode_pieces(around("today<s>"))  # the other way: run by run
    at = plain.index(2)
    assert odd[: at + 2] == plain[: at + 2] and odd[odd.index(2, at + 1) :] == plain[plain.index(2, at + 1) :]
    assert odd.count(1) == 1 and odd.count(2) == 2
