"""What OpenAI's clients send and get, on an engine whose answers are known beforehand."""

import chat_factory
import fake_engine
import pytest
from serving_factory import chat_body, error_of, running, spied, sse

EOS = chat_factory.EOS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = fake_engine.fake_model(chat_factory.write_aquila_tokenizer(folder / "tokenizer"))
    with running(model, folder / "log", max_body=20_000) as server:
        yield server


def drawn(server, **more) -> str:
    response = server.chat(**more)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# ------------------------------------------------------------------------------------------------------- answers


def test_a_chat_answer_has_openais_shape(server):
    response = server.chat("hi")
    assert response.headers["x-request-id"].startswith("req-")
    found = response.json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-") and found["model"] == "tiny"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": fake_engine.ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = len(server.service.prompts.encode([{"role": "user", "content": "hi"}]))
    answer = len(server.service.ids_of(fake_engine.ANSWER)) + 1  # and the end token
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_white_space_before_a_chat_answer_is_left_out_and_kept_in_a_completion(server):
    assert drawn(server, content="say<  \n good>") == "good"
    assert server.complete("say<  \n good>").json()["choices"][0]["text"] == "  \n good"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_ends_with_length(server, limit):
    found = server.chat("endless", **{limit: 6}).json()
    assert found["choices"][0]["finish_reason"] == "length" and found["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("stop", ["please", ["please"], ["!", "🙂, p", "never"], "lea"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_wherever_tokens_begin(server, stop, stream):
    expected = min((fake_engine.ANSWER.split(s)[0] for s in ([stop] if isinstance(stop, str) else stop)), key=len)
    response = server.chat(stop=stop, stream=stream)
    if not stream:
        (choice,) = response.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    else:
        chunks = [event["choices"][0] for event in sse(response.text)[:-1]]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == expected
        assert chunks[-1]["finish_reason"] == "stop"


def test_control_without_the_stop_string_the_answer_is_whole(server):
    assert drawn(server, stop=["not there"]) == fake_engine.ANSWER


def test_n_gives_parallel_choices_counted_through(server):
    found = server.chat("say<ab>", n=3).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in found["choices"]} == {"ab"}
    one = server.chat("say<ab>").json()["usage"]
    assert found["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    assert found["usage"]["prompt_tokens"] == one["prompt_tokens"]


def test_logprobs_of_a_chat_name_every_token_with_its_bytes(server):
    (choice,) = server.chat(logprobs=True, top_logprobs=2).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == fake_engine.ANSWER
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in entries)
    parts = [entry for entry in entries if entry["token"].startswith("bytes:")]
    assert parts, "the emoji is made of several tokens, none of them text"
    for part in parts:
        assert part["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in part["bytes"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "stop", "text", "tokens"),
    [
        ("hi", "e!", "你好 🙂, pleas", "你好 🙂, please"),  # inside a token, which is there as a whole
        ("hi", "!", "你好 🙂, please", "你好 🙂, please"),  # between two, of which the second is not
        ("say<  \n  good day!>", "!", "good day", "  \n  good day"),  # the white space that is left out has tokens too
    ],
)
def test_logprobs_stop_where_the_text_does(server, stream, asked, stop, text, tokens):
    response = server.chat(asked, stop=stop, logprobs=True, stream=stream)
    if stream:
        choices = [event["choices"][0] for event in sse(response.text)[:-1]]
        entries = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
        content = "".join(c["delta"].get("content", "") for c in choices)
    else:
        (choice,) = response.json()["choices"]
        entries, content = choice["logprobs"]["content"], choice["message"]["content"]
    assert content == text
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == tokens


# ---------------------------------------------------------------------------------------------------- parameters


def given_to_engine(server, monkeypatch, **parameters):
    """The SamplingParams that a request's parameters become."""
    seen = spied(server, monkeypatch)
    response = server.chat(**parameters)
    assert response.status_code == 200, response.text
    return seen[0][1]


def test_every_parameter_reaches_the_engine(server, monkeypatch):
    asked = dict(temperature=0.3, top_p=0.8, top_k=7, min_p=0.05, presence_penalty=0.1, frequency_penalty=-0.2)
    asked |= dict(repetition_penalty=1.2, seed=5, n=2, stop_token_ids=[9])
    params = given_to_engine(
        server, monkeypatch, **asked, logit_bias={"7": -100, "8": 1.5}, logprobs=True, top_logprobs=3, min_tokens=2,
        max_tokens=5,
    )  # fmt: skip
    for name, value in asked.items():
        if name != "stop_token_ids":
            assert getattr(params, name) == value, name
    assert params.logit_bias == {7: -100, 8: 1.5} and params.logprobs == 3
    assert (params.max_new_tokens, params.min_new_tokens) == (5, 2)
    assert EOS in params.stop_ids and 9 in params.stop_ids


def test_absent_and_null_parameters_mean_openais_defaults(server, monkeypatch):
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "logprobs"])
    for asked in ({}, nulls):
        params = given_to_engine(server, monkeypatch, **asked)
        assert (params.temperature, params.top_p, params.top_k, params.n) == (1, 1, 0, 1)
        assert params.seed is None and params.logprobs is None
        prompt = len(server.service.prompts.encode([{"role": "user", "content": "hi"}]))
        assert params.max_new_tokens == server.service.engine.max_length - prompt


def test_a_negative_seed_and_top_p_zero_are_taken(server, monkeypatch):
    params = given_to_engine(server, monkeypatch, seed=-1, top_p=0, top_k=-1)
    assert params.seed == 2**64 - 1 and 0 < params.top_p < 1e-6 and params.top_k == 0


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"logit_bais": {}}, "logit_bais", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 100}, "n", "invalid_value"),  # more than running and waiting together
        ({"n": 1.5}, "n", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": "x" * 501}, "stop[0]", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 4}, None, "invalid_value"),
        ({"max_tokens": 10_000}, "messages", "context_length_exceeded"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bo"}]}, "messages[0].name", "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"model": "gpt-4"}, "model", "model_not_found"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(server, wrong, param, code):
    before = server.service.engine.stats.prompt_tokens
    error = error_of(
        server.client.post("/v1/chat/completions", json={**chat_body(), **wrong}),
        404 if code == "model_not_found" else 400,
    )
    assert (error["param"], error["code"]) == (param, code)
    assert param is None or param.split("[")[0].split(".")[0] in error["message"] or code == "context_length_exceeded"
    assert server.service.engine.stats.prompt_tokens == before, "nothing was computed"


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"functions": []},
        {"response_format": {"type": "text"}}, {"prompt_cache_key": "x"},
        {"store": False}, {"user": "me"}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"modalities": ["text"]},
        {"parallel_tool_calls": None}, {"stream": False}, {"stream": None}, {"model": "tiny"},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_ask_for_nothing_are_taken(server, neutral):
    assert drawn(server, **neutral) == fake_engine.ANSWER


def test_all_findings_come_together(server):
    error = error_of(server.client.post("/v1/chat/completions", json={"n": 0, "foo": 1, "top_p": 3}))
    assert all(name in error["message"] for name in ("`n`", "`foo`", "`top_p`", "`messages`"))


def test_a_body_full_of_mistakes_gets_a_short_answer(server):
    many = {f"x{i}": 1 for i in range(1000)}
    response = server.client.post("/v1/chat/completions", json={**chat_body(), **many})
    assert "1,001 parameters" in error_of(response)["message"] and len(response.content) < 1000
    response = server.client.post("/detokenize", json={"tokens": [-1] * 5000})
    assert error_of(response)["param"] == "tokens[0]" and len(response.content) < 1000


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'"x"', "invalid_json"),
        (b"\xff\xfe", None),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", None),
        (b"[" * 9000, None),
    ],
    ids=["cut", "empty", "list", "text", "bytes", "surrogate", "NaN", "huge number", "deep"],
)  # fmt: skip
def test_damaged_bodies_are_named_as_such(server, body, code):
    headers = {"content-type": "application/json"}
    error = error_of(server.client.post("/v1/chat/completions", content=body, headers=headers))
    assert code is None or error["code"] == code
    assert drawn(server) == fake_engine.ANSWER


# ------------------------------------------------------------------------------------------------------- messages


def prompt_given(server, monkeypatch, messages) -> list[int]:
    seen = spied(server, monkeypatch)
    response = server.client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200, response.text
    return seen[0][0]


def test_developer_is_system_and_parts_are_joined(tmp_path, monkeypatch):
    model = fake_engine.fake_model(chat_factory.write_aquila_tokenizer(tmp_path / "tokenizer"))
    from aquila_pd.text.prompts import ChatPrompts

    model.prompts = ChatPrompts(model.tokenizer, "aquila-legacy")
    with running(model, tmp_path / "log") as server:
        plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]
        parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
        same = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
        expected = model.prompts.encode(plain)
        assert prompt_given(server, monkeypatch, plain) == expected
        assert prompt_given(server, monkeypatch, same) == expected
        assert prompt_given(server, monkeypatch, plain[1:]) != expected


def test_an_answer_can_be_sent_back_as_it_came(server):
    message = server.chat("hi").json()["choices"][0]["message"]
    turns = [
        {"role": "user", "content": "hi"},
        {**message, "annotations": [], "tool_calls": None, "audio": None},
        {"role": "user", "content": "say<more>"},
    ]
    response = server.client.post("/v1/chat/completions", json={"messages": turns})
    assert response.json()["choices"][0]["message"]["content"] == "more"


def test_what_a_user_types_is_never_a_special_token(server, monkeypatch):
    ids = prompt_given(server, monkeypatch, [{"role": "user", "content": "a</s>b[CLS]"}])
    assert EOS not in ids and chat_factory.CLS not in ids


def test_without_a_template_there_is_no_chat_but_completions(tmp_path):
    model = fake_engine.fake_model(chat_factory.write_aquila_tokenizer(tmp_path / "tokenizer"))
    model.prompts = None
    with running(model, tmp_path / "log") as server:
        error = error_of(server.chat())
        assert error["code"] == "no_chat_template" and "--template" in error["message"]
        assert server.complete("say<x>").json()["choices"][0]["text"] == "x"
        assert server.client.post("/", json={"prompt": "say<x>", "sft": False}).json()["response"] == "x"


def test_an_answer_ends_at_the_templates_own_stop_strings(tmp_path):
    from aquila_pd.text.prompts import ChatPrompts

    model = fake_engine.fake_model(chat_factory.write_aquila_tokenizer(tmp_path / "tokenizer"))
    model.prompts = ChatPrompts(model.tokenizer, "aquila-chat")
    assert "###" in model.prompts.stop_strings
    with running(model, tmp_path / "log") as server:
        assert drawn(server, content="say<yes.§§§Human: and now I go on>", stop="never") == "yes."
        (choice,) = server.complete("say<a§§§b>").json()["choices"]
        assert choice["text"] == "a###b", "control: a text that is continued has no template"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/"])
def test_every_endpoint_ends_at_the_end_token(server, monkeypatch, path):
    seen = spied(server, monkeypatch)
    body = chat_body() if "chat" in path else {"prompt": "hi"}
    assert server.client.post(path, json=body).status_code == 200
    assert EOS in seen[0][1].stop_ids
