"""predict(): upstream's signature and meaning; each of upstream's defects has a test here that it would fail."""

import inspect
import logging

import numpy as np
import paddle
import pytest
from chat_factory import tiny_chat_folder, tiny_ziya_folder

from aquila_pd.chat import predict as module
from aquila_pd.chat.predict import ENGINE, messages_of, predict
from aquila_pd.generation import Engine
from aquila_pd.modeling import AquilaForCausalLM
from aquila_pd.tokenizer import AquilaTokenizer
from aquila_pd.utils.errors import ChatError, ConfigError, GenerationError

GREEDY = dict(temperature=0, max_gen_len=12)


def loaded(folder) -> tuple[AquilaForCausalLM, AquilaTokenizer]:
    model = AquilaForCausalLM.from_pretrained(str(folder))
    model.eval()
    return model, AquilaTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_folder(tmp_path_factory.mktemp("predict") / "chat", "aquila-v1")


@pytest.fixture
def pair(folder):
    return loaded(folder)


@pytest.fixture
def plain(tmp_path):
    """A model whose tokenizer carries no chat template."""
    return loaded(tiny_chat_folder(tmp_path / "plain", None))


@pytest.fixture
def prompts_seen(monkeypatch) -> list[list[int]]:
    """The prompts that reach the engine."""
    seen, add = [], Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, ids, *rest: seen.append(list(ids)) or add(self, ids, *rest))
    return seen


@pytest.fixture
def params_seen(monkeypatch) -> list:
    seen, add = [], Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, ids, *rest: seen.append(rest[0]) or add(self, ids, *rest))
    return seen


# ------------------------------------------------------------------------------------------------ signature, answer


def test_the_signature_is_upstreams():
    wanted = "model text tokenizer max_gen_len top_p seed topk temperature sft convo_template device model_name history"
    parameters = inspect.signature(predict).parameters
    assert list(parameters) == [*wanted.split(), "kwargs"]
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert defaults == {
        "tokenizer": None,
        "max_gen_len": 200,
        "top_p": 0.9,
        "seed": 123,
        "topk": 15,
        "temperature": 1.0,
        "sft": True,
        "convo_template": "",
        "device": None,
        "model_name": "AquilaChat2-7B",
        "history": None,
    }


def test_the_method_answers_and_the_seed_decides(pair):
    model, tokenizer = pair
    answers = [model.predict("你好", tokenizer=tokenizer, seed=seed, max_gen_len=30) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert all(isinstance(answer, str) and answer for answer in answers)


def test_the_answer_is_what_greedy_generation_says(pair):
    model, tokenizer = pair
    found = predict(model, "Hello", tokenizer, **GREEDY)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_tensors="pd")
    wanted, _ = model.generate(**ids, max_new_tokens=12, decode_strategy="greedy_search")
    assert found == tokenizer.decode(wanted[0].tolist(), skip_special_tokens=True).lstrip()


def test_without_sft_the_text_is_continued_as_it_is(pair, prompts_seen):
    model, tokenizer = pair
    predict(model, "Hello, please", tokenizer, sft=False, **GREEDY)
    predict(model, "Hello, please", tokenizer, **GREEDY)
    plain = tokenizer.encode("Hello, please")["input_ids"]
    assert prompts_seen[0] == plain
    assert prompts_seen[1] != plain  # control: the template's turn around it


def test_a_model_in_training_answers_and_stays_in_training(pair):
    model, tokenizer = pair
    model.train()
    predict(model, "Hello", tokenizer, **GREEDY)
    assert model.training


# ------------------------------------------------------------------------------------------- upstream's defects


def test_history_is_read_in_its_order_and_grows_by_one_turn(pair, prompts_seen):
    """Upstream reversed it from two turns on, and left it empty."""
    model, tokenizer = pair
    history = [("first", "one"), ("second", "two")]
    answer = predict(model, "third", tokenizer, history=history, **GREEDY)
    assert history == [("first", "one"), ("second", "two"), ("third", answer)]
    text = tokenizer.decode(prompts_seen[0])
    places = [text.index(word) for word in ("first", "one", "second", "two", "third")]
    assert places == sorted(places)


def test_history_of_messages_grows_by_messages(pair):
    model, tokenizer = pair
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    answer = predict(model, "third", tokenizer, history=history, **GREEDY)
    assert history[2:] == [{"role": "user", "content": "third"}, {"role": "assistant", "content": answer}]
    empty = []
    assert predict(model, "x", tokenizer, history=empty, **GREEDY) == empty[0][1]
    assert messages_of([("q", "a")], "x") == messages_of(history[:2], "x")


def test_a_history_is_as_before_after_an_error(pair):
    model, tokenizer = pair
    history = [("first", "one")]
    with pytest.raises(GenerationError):
        predict(model, "x", tokenizer, history=history, temperature=-1)
    assert history == [("first", "one")]


@pytest.mark.parametrize("history", [["text"], [("a", "b", "c")], [("a", None)], [{"role": "user", "content": "q"}]])
def test_a_history_that_is_none_is_named(pair, history):
    with pytest.raises(ChatError):
        predict(*pair[:1], "x", pair[1], history=history, **GREEDY)


def test_a_history_beyond_the_context_loses_its_oldest_turns_whole(pair, prompts_seen, caplog):
    """Upstream's limit was 20480 tokens whatever the model held."""
    model, tokenizer = pair
    history = [(f"question {i} " + "word " * 8, f"answer {i}") for i in range(12)]
    kept = list(history)
    with caplog.at_level(logging.WARNING, logger="aquila_pd"):
        predict(model, "last", tokenizer, history=history, **GREEDY)
    assert history[:-1] == kept
    (ids,) = prompts_seen
    assert len(ids) + 12 <= 256 and "turns were left out" in caplog.text
    text = tokenizer.decode(ids)
    assert "question 11" in text and "question 0 " not in text
    first = next(i for i in range(12) if f"question {i} " in text)
    assert text.startswith(f"<|startofpiece|>question {first} ")  # a whole turn
    longer = tokenizer.apply_chat_template(
        [m for turn in kept[first - 1 :] for m in messages_of([turn], "x")[:-1]] + [{"role": "user", "content": "last"}]
    )["input_ids"]
    assert len(longer) + 12 > 256  # control: no turn left out without need


def test_a_text_or_an_answer_longer_than_the_model_is_an_error(pair):
    model, tokenizer = pair
    with pytest.raises(ChatError, match="fit"):
        predict(model, "word " * 300, tokenizer, **GREEDY)
    with pytest.raises(GenerationError, match="max_gen_len is 256"):
        predict(model, "x", tokenizer, max_gen_len=256)


def test_nothing_is_printed(pair, capfd):
    """Upstream printed the prompt."""
    predict(*pair[:1], "Hello", pair[1], **GREEDY)
    assert capfd.readouterr() == ("", "")


def test_the_order_of_filters_is_the_standard_one_unless_asked(pair, params_seen):
    model, tokenizer = pair
    sampled = dict(max_gen_len=40, temperature=3.0, topk=40, top_p=0.6)
    standard = predict(model, "Hello", tokenizer, **sampled)
    upstream = predict(model, "Hello", tokenizer, order="aquila", **sampled)
    assert [p.order for p in params_seen] == ["standard", "aquila"]
    assert standard != upstream
    with pytest.raises(GenerationError, match="order: it is 'other'"):
        predict(model, "Hello", tokenizer, order="other")


def test_temperature_0_takes_the_likeliest_whatever_the_seed(pair):
    model, tokenizer = pair
    assert len({predict(model, "Hello", tokenizer, seed=seed, **GREEDY) for seed in range(4)}) == 1
    assert len({predict(model, "Hello", tokenizer, seed=seed, max_gen_len=12) for seed in range(4)}) == 4  # control


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_a_named_error_and_the_model_goes_on(pair, value):
    """Upstream's sampler crashed, and with it the web service."""
    model, tokenizer = pair
    before = predict(model, "Hello", tokenizer, **GREEDY)
    norm = model.aquila.norm.weight
    healthy = norm.numpy()
    norm.set_value(np.full_like(healthy, value))
    history = [("a", "b")]
    with pytest.raises(GenerationError, match="NaN or infinite"):
        predict(model, "Hello", tokenizer, history=history, **GREEDY)
    assert history == [("a", "b")]
    norm.set_value(healthy)
    assert predict(model, "Hello", tokenizer, **GREEDY) == before


def scripted(monkeypatch, tokenizer, text: str) -> None:
    """The model says this text and then eos, whatever its weights are."""
    ids = [*tokenizer.encode(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr("aquila_pd.generation.sampler.choose", lambda logits, s: ids[min(len(s.tokens), len(ids) - 1)])


@pytest.mark.parametrize(("template", "cut"), [("aquila-v1", False), ("aquila-chat", True)])
def test_hashes_end_an_answer_only_where_the_template_says_so(pair, monkeypatch, template, cut):
    """Upstream cut every answer at "###", Markdown headings too."""
    model, tokenizer = pair
    scripted(monkeypatch, tokenizer, " Title\n### Part")
    found = predict(model, "Hello", tokenizer, convo_template=template, max_gen_len=40)
    assert found == ("Title\n" if cut else "Title\n### Part")


def test_an_unknown_model_name_is_an_error_that_lists_the_known(plain, prompts_seen):
    """Upstream took another model's template, silently."""
    model, tokenizer = plain
    with pytest.raises(ConfigError) as error:
        predict(model, "Hello", tokenizer, model_name="GPT-9")
    assert "'GPT-9' is not a known chat model" in str(error.value)
    assert "AquilaChat2-34B" in str(error.value) and "aquila-legacy" in str(error.value)
    with pytest.raises(ConfigError, match="base model"):
        predict(model, "Hello", tokenizer, model_name="Aquila2-7B")
    for name in module.PUBLISHED:  # the list tells the truth
        assert module.template_by_name(name)[1] is not None
    predict(model, "Hello", tokenizer, model_name="AquilaChat2-34B", max_gen_len=2)
    assert "### Human: Hello" in tokenizer.decode(prompts_seen[-1])


def test_a_template_by_name_goes_before_the_folders_own_and_that_before_the_model_name(pair, prompts_seen):
    model, tokenizer = pair
    predict(model, "Hello", tokenizer, model_name="AquilaChat2-34B", max_gen_len=2)
    predict(model, "Hello", tokenizer, convo_template="aquila-legacy", max_gen_len=2)
    own, named = map(tokenizer.decode, prompts_seen)
    assert own == "<|startofpiece|>Hello<|endofpiece|>"
    assert "### Human: Hello" in named
    with pytest.raises(ConfigError, match="aquila-v1"):
        predict(model, "Hello", tokenizer, convo_template="aquila-v7")


def test_nothing_that_is_not_honoured_is_accepted(pair):
    """Upstream's **kwargs swallowed a misspelled temperature; its predict needed a method that libraries removed."""
    model, tokenizer = pair
    with pytest.raises(GenerationError, match="knows no temprature"):
        predict(model, "Hello", tokenizer, temprature=0.1)
    with pytest.raises(GenerationError, match="AquilaTokenizer"):
        predict(model, "Hello")
    with pytest.raises(GenerationError, match="on the cpu"):
        predict(model, "Hello", tokenizer, device="cuda:0")
    with pytest.raises(ChatError, match="history"):
        predict(model, "Hello", tokenizer, sft=False, history=[("a", "b")])
    assert predict(model, "Hello", tokenizer, device="cpu", **GREEDY)


def test_typed_special_tokens_are_text(pair, prompts_seen):
    model, tokenizer = pair
    predict(model, "</s><|endofpiece|>", tokenizer, **GREEDY)
    special = set(tokenizer.all_special_ids)
    assert [tokenizer.convert_ids_to_tokens(i) for i in prompts_seen[0] if i in special] == [
        "<|startofpiece|>",
        "<|endofpiece|>",
    ]


def test_a_sentencepiece_model_keeps_the_space_between_a_text_and_its_continuation(tmp_path, monkeypatch):
    model, tokenizer = loaded(tiny_ziya_folder(tmp_path / "Ziya2-13B-Chat"))
    scripted(monkeypatch, tokenizer, "world 🦄")
    assert predict(model, "hello", tokenizer, sft=False, max_gen_len=20) == " world 🦄"
    assert predict(model, "hello", tokenizer, max_gen_len=20) == "world 🦄"  # an answer begins without


# ----------------------------------------------------------------------------------------------- the kept engine


def test_the_next_turn_computes_only_what_is_new(pair):
    model, tokenizer = pair
    history = []
    predict(model, "The quick brown fox jumps over the lazy dog", tokenizer, history=history, max_gen_len=30)
    engine = model.__dict__[ENGINE][1]
    before = engine.stats.reused_tokens
    predict(model, "more", tokenizer, history=history, max_gen_len=8)
    assert model.__dict__[ENGINE][1] is engine
    assert engine.stats.reused_tokens - before > 20


def test_trained_weights_do_not_meet_the_keys_of_the_old_ones(pair, folder):
    model, tokenizer = pair
    text = "The quick brown fox jumps over the lazy dog"
    old = predict(model, text, tokenizer, **GREEDY)
    optimizer = paddle.optimizer.SGD(learning_rate=5.0, parameters=model.parameters())
    ids = paddle.to_tensor([tokenizer.encode(text)["input_ids"]])
    model(ids, labels=ids, return_dict=True).loss.backward()
    optimizer.step()
    found = predict(model, text, tokenizer, **GREEDY)
    del model.__dict__[ENGINE]
    assert found == predict(model, text, tokenizer, **GREEDY) != old


def test_control_a_kept_engine_would_answer_from_the_old_keys(pair, monkeypatch):
    """Why the weights are looked at: without that, the engine goes on with keys of weights that are gone."""
    model, tokenizer = pair
    monkeypatch.setattr(module, "_fingerprint", lambda model: 0)
    text = "The quick brown fox jumps over the lazy dog"
    predict(model, text, tokenizer, **GREEDY)
    for parameter in model.parameters():
        parameter.set_value(parameter * 1.5)
    stale = predict(model, text, tokenizer, **GREEDY)
    del model.__dict__[ENGINE]
    assert stale != predict(model, text, tokenizer, **GREEDY)
