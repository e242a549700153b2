"""ChatPrompts: prompts of a named template or the folder's own, what ends an answer, and what fits."""

import copy
import json

import pytest
from chat_factory import write_aquila_tokenizer
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila_pd import AquilaTokenizer
from aquila_pd.text.prompts import OWN, ChatPrompts
from aquila_pd.tokenization.chat_templates import TEMPLATES
from aquila_pd.utils.errors import ChatError, ConfigError

SYSTEM = {"role": "system", "content": "be brief"}
NAMES = [name for name in TEMPLATES if name != "chatml"]  # Aquila's tokenizer has not the two tokens of ChatML


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> AquilaTokenizer:
    return AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def with_jinja(tokenizer: AquilaTokenizer, jinja: str) -> AquilaTokenizer:
    made = copy.copy(tokenizer)
    made.init_kwargs = dict(tokenizer.init_kwargs)
    made.init_chat_template(jinja)
    return made


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------------- prompts


def test_golden_prompts_have_their_ids(shared):
    tokenizer = AquilaTokenizer.from_pretrained(str(shared / "tokenizer"))
    prompts = {name: ChatPrompts(tokenizer, name) for name in NAMES}
    compared = 0
    for row in json.loads((shared / "tokenizer" / "chat_golden_dev.json").read_text()):
        said = [message for q, a in row["turns"] for message in (user(q), *([assistant(a)] if a is not None else []))]
        if row["ids"] is not None:
            assert prompts[row["template"]].encode(said) == row["ids"]
            compared += 1
    assert compared >= 45


def test_a_named_template_goes_before_the_folders_own(tokenizer):
    folder = with_jinja(tokenizer, TEMPLATES["aquila-v1"].jinja())
    own, named = ChatPrompts(folder), ChatPrompts(folder, "aquila-legacy")
    assert (own.name, named.name) == ("aquila-v1", "aquila-legacy")
    assert own.encode([user("q")]) == folder.apply_chat_template([user("q")])["input_ids"]
    assert (
        named.encode([user("q")])
        == ChatPrompts(tokenizer, "aquila-legacy").encode([user("q")])
        != own.encode([user("q")])
    )


def test_without_any_template_and_with_an_unknown_one_the_error_says_what_to_do(tokenizer):
    with pytest.raises(ConfigError, match="records no chat template"):
        ChatPrompts(tokenizer)
    with pytest.raises(ConfigError, match="Did you mean aquila-v1"):
        ChatPrompts(tokenizer, "aquilla-v1")


def test_a_template_whose_special_tokens_are_not_there_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"needs special tokens .*<\|im_start\|>, <\|im_end\|>"):
        ChatPrompts(tokenizer, "chatml")


def test_a_foreign_template_gives_prompts_too(tokenizer):
    jinja = "{% for m in messages %}[CLS]{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    prompts = ChatPrompts(with_jinja(tokenizer, jinja))
    assert prompts.name == OWN and prompts.encode([user("hi")]) == tokenizer("[CLS]user: hi</s>")["input_ids"]
    assert prompts.encode([user("</s>")]).count(tokenizer.eos_token_id) == 1


# ---------------------------------------------------------------------------------------------------------- ends

STOPS = {  # name: (texts that end an answer, tokens that do)
    "aquila-chat": (("###", "[UNK]"), ["</s>"]),
    "aquila": (("[UNK]",), ["</s>"]),
    "aquila-legacy": (("[UNK]",), ["</s>"]),
    "aquila-v1": ((), ["</s>", "<|endoftext|>"]),
    "aquila-v2": ((), ["</s>", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>"]),
    "ziya": ((), ["</s>"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_ends_at_the_templates_texts_and_tokens(tokenizer, name):
    prompts = ChatPrompts(tokenizer, name)
    texts, tokens = STOPS[name]
    assert prompts.stop_strings == texts
    assert prompts.stop_ids == tuple(map(tokenizer.convert_tokens_to_ids, tokens))


def test_ids_of_the_models_config_files_end_an_answer_too(tokenizer):
    eos = tokenizer.eos_token_id
    assert ChatPrompts(tokenizer, "aquila", eos_ids=[5, eos, 7, 5]).stop_ids == (eos, 5, 7)


def test_chatml_ends_at_its_token(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    prompts = ChatPrompts(made, "chatml")
    assert prompts.stop_strings == () and prompts.stop_ids == (
        made.eos_token_id,
        made.convert_tokens_to_ids("<|im_end|>"),
    )


@pytest.mark.parametrize(
    "jinja, ends",
    [
        ("{% for m in messages %}{{ m['content'] }}<|endofpiece|>\n{% endfor %}", ["</s>", "<|endofpiece|>"]),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", ["</s>"]),
        (
            "{% if messages[1] %}{{ raise_exception('one message only') }}{% endif %}{{ messages[0]['content'] }}",
            ["</s>"],
        ),
    ],
)
def test_a_foreign_templates_end_is_the_special_token_behind_an_answer(tokenizer, jinja, ends):
    prompts = ChatPrompts(with_jinja(tokenizer, jinja))
    assert prompts.stop_strings == () and prompts.stop_ids == tuple(map(tokenizer.convert_tokens_to_ids, ends))


# ----------------------------------------------------------------------------------------------------------- fit

texts = st.text(max_size=12) | st.sampled_from(["###Human: x", "</s>", "你好" * 5, ""])
turns = st.tuples(texts, st.lists(texts, max_size=2)).map(lambda t: [user(t[0]), *map(assistant, t[1])])


@settings(max_examples=tries(50, 150), deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES), has_system=st.booleans(), talk=st.lists(turns, min_size=1, max_size=7), data=st.data()
)
def test_whole_oldest_turns_are_dropped_and_as_few_as_it_takes(tokenizer, name, has_system, talk, data):
    prompts = ChatPrompts(tokenizer, name)
    system = [SYSTEM] if has_system and TEMPLATES[name].system else []

    def without(count: int) -> list[dict]:
        return [*system, *(message for turn in talk[count:] for message in turn)]

    lengths = [len(prompts.encode(without(count))) for count in range(len(talk))]
    limit = data.draw(st.integers(min_value=min(lengths), max_value=max(lengths) + 2))
    before = copy.deepcopy(without(0))
    kept, dropped = prompts.fit(without(0), limit)
    fitting = [count for count, length in enumerate(lengths) if length <= limit]
    assert dropped == fitting[0] and kept == without(dropped)
    assert without(0) == before  # the caller's list is the caller's


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_what_cannot_be_dropped_and_does_not_fit_is_an_error_with_both_numbers(tokenizer, system):
    prompts = ChatPrompts(tokenizer, "aquila")
    last = [*system, user("a long question " * 20)]
    needed = len(prompts.encode(last))
    talk = [*system, user("q"), assistant("a"), last[-1]]
    assert prompts.fit(talk, needed) == (last, 1)
    with pytest.raises(ChatError, match=f"{needed:,} tokens, and at most {needed - 1:,} fit"):
        prompts.fit(talk, needed - 1)


def test_the_last_turn_stays_whole_when_it_has_an_answer(tokenizer):
    prompts = ChatPrompts(tokenizer, "aquila-v1")
    last = [user("q2"), assistant("a2")]
    talk = [user("q1"), assistant("a1"), *last]
    assert prompts.fit(talk, len(prompts.encode(last))) == (last, 1)


def test_what_cannot_be_written_cannot_be_fitted(tokenizer):
    for messages in ([], [{"role": "tool", "content": "x"}], [user("x"), SYSTEM], ["x"]):
        with pytest.raises(ChatError):
            ChatPrompts(tokenizer, "aquila").fit(messages, 100)
