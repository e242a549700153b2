"""What OpenAI's clients send and get, on an engine whose answers are known beforehand."""

import json

import chat_factory
import fake_engine
import pytest
from serving_factory import chat_body, running, sse

EOS = chat_factory.EOS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = fake_engine.fake_model(chat_factory.write_aquila_tokenizer(folder / "tokenizer"))
    with running(model, folder / "log", max_body=20_000) as server:
        yield server


def error_of(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def drawn(server, **more) -> str:
    response = server.chat(**more)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def spied(server, monkeypatch) -> list[tuple]:
    """(prompt, params) of everything that is given to the engine from now on."""
    seen = []
    add = server.service.engine.add

    def noted(prompt, params, listener):
        seen.append((list(prompt), params))
        return add(prompt, params, listener)

    monkeypatch.setattr(server.service.engine, "add", noted)
    return seen


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
def test_logprobs_stop_where_the_text_does(server, stream):
    response = server.chat(stop="e!", logprobs=True, stream=stream)
    if stream:
        choices = [event["choices"][0] for event in sse(response.text)[:-1]]
        entries = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
        text = "".join(c["delta"].get("content", "") for c in choices)
    else:
        (choice,) = response.json()["choices"]
        entries, text = choice["logprobs"]["content"], choice["message"]["content"]
    said = bytes(byte for entry in entries for byte in entry["bytes"]).decode()
    assert (text, said) == ("你好 🙂, pleas", "你好 🙂, please"), (
        "the token that was cut is there, the one behind is not"
    )


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
    from aquila_pd.chat.prompts import ChatPrompts

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


# ---------------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize("kind", ["text", "texts", "ids", "lists of ids"])
def test_prompts_come_in_four_kinds(server, kind):
    texts = ["say<a>", "say<bc>"]
    ids = [server.service.ids_of(text) for text in texts]
    prompt = {"text": texts[1], "texts": texts, "ids": ids[1], "lists of ids": ids}[kind]
    choices = server.complete(prompt).json()["choices"]
    expected = ["bc"] if kind in ("text", "ids") else ["a", "bc"]
    assert [choice["text"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == list(range(len(expected)))


def test_choices_of_several_prompts_count_through(server):
    choices = server.complete(["say<a>", "say<b>"], n=2).json()["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_an_answer_has_16_tokens_unless_asked(server):
    assert server.complete("endless").json()["usage"]["completion_tokens"] == 16


def test_legacy_logprobs_are_four_lists_of_one_length(server):
    (choice,) = server.complete("hi", logprobs=2).json()["choices"]
    found = choice["logprobs"]
    assert list(found) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert len({len(row) for row in found.values()}) == 1
    assert found["token_logprobs"] == [-0.5] * len(found["tokens"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token
    assert all(set(top) >= {token} for token, top in zip(found["tokens"], found["top_logprobs"], strict=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_repeats_the_prompt_with_its_logprobs(server, stream, as_ids):
    text = "你好 say<ab> 🙂"
    prompt = server.service.ids_of(text) if as_ids else text
    response = server.complete(prompt, echo=True, logprobs=1, stream=stream)
    if stream:
        choices = [event["choices"][0] for event in sse(response.text)[:-1]]
        rows = [c["logprobs"] for c in choices if c["logprobs"]]
        found = {key: [value for row in rows for value in row[key]] for key in rows[0]}
        said = "".join(c["text"] for c in choices)
    else:
        (choice,) = response.json()["choices"]
        found, said = choice["logprobs"], choice["text"]
    assert said == text + "ab"
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert None not in found["token_logprobs"][1:]
    assert len(found["tokens"]) == len(server.service.ids_of(text)) + len(server.service.ids_of("ab"))
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert said[offset : offset + len(token)] == token


def test_a_text_is_scored_without_an_answer(server):
    found = server.complete("hello", echo=True, logprobs=0, max_tokens=0).json()
    (choice,) = found["choices"]
    assert choice["text"] == "hello" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][1:] == [-0.5] * (len(choice["logprobs"]["tokens"]) - 1)
    assert found["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 13}, "n"),
        ({}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
    ids=str,
)
def test_wrong_completion_requests_are_named(server, wrong, param):
    assert error_of(server.client.post("/v1/completions", json=wrong))["param"] == param


def test_a_prompt_that_is_too_long_is_told_the_numbers(server):
    error = error_of(server.complete([5] * 256))
    assert error["code"] == "context_length_exceeded" and error["message"].count("256") == 2
    error = error_of(server.complete([5] * 250, max_tokens=7))
    assert all(number in error["message"] for number in ("250", "7", "257", "256"))
    assert server.complete([5] * 250, max_tokens=6).status_code == 200
    assert server.complete([5] * 256, max_tokens=0, echo=True).status_code == 200


# ------------------------------------------------------------------------------------------------- other endpoints


def test_models_are_listed_and_found_by_name(server):
    (entry,) = server.client.get("/v1/models").json()["data"]
    assert entry["id"] == "tiny" and entry["object"] == "model"
    assert server.client.get("/v1/models/tiny").json() == entry
    assert error_of(server.client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_text_becomes_ids_and_ids_text(server):
    found = server.client.post("/tokenize", json={"prompt": "你好 🙂</s>", "return_token_strs": True}).json()
    assert found["tokens"] == server.service.ids_of("你好 🙂</s>") and found["tokens"][-1] == EOS
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert server.client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "你好 🙂</s>"}
    messages = chat_body("hi")["messages"]
    assert server.client.post("/tokenize", json={"messages": messages}).json()["tokens"] == (
        server.service.prompts.encode(messages)
    )
    error_of(server.client.post("/tokenize", json={}))


def test_the_seeds_own_service(server):
    found = server.client.post("/", json={"prompt": "say<好的>"}).json()
    assert set(found) == {"response", "status", "time"}
    assert (found["response"], found["status"]) == ("好的", 200)


def test_the_seeds_service_has_history_and_drops_the_oldest_turns(server, monkeypatch):
    seen = spied(server, monkeypatch)
    history = [["old " * 60, "x"], ["new", "y"]]
    found = server.client.post("/", json={"prompt": "say<z>", "history": history, "max_gen_len": 100}).json()
    assert found["response"] == "z"
    (prompt, params), encode = seen[0], server.service.prompts.encode
    kept = [("user", "new"), ("assistant", "y"), ("user", "say<z>")]
    assert prompt == encode([{"role": role, "content": text} for role, text in kept])
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (1.0, 15, 0.9, 123)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "max_gen_len": 256}, "max_gen_len"),
        ({"prompt": "x" * 2000}, "prompt"),
        ({"prompt": "x", "history": [["a"]]}, "history[0]"),
        ({"prompt": "x", "history": [["a", "b"]], "sft": False}, "history"),
        ({"prompt": "x", "topp": 1}, "topp"),
    ],
    ids=str,
)
def test_wrong_requests_to_the_seeds_service_are_named(server, wrong, param):
    response = server.client.post("/", json={"sft": "history" in wrong and "sft" not in wrong, **wrong})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error


def test_the_seeds_service_says_what_a_nan_means(server):
    response = server.client.post("/", json={"prompt": "nan<2>"})
    assert response.status_code == response.json()["status"] == 500
    assert response.json()["error"]["code"] == "nonfinite_logits" and response.json()["response"] == ""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/models", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("PATCH", "/", 405),
    ],
)
def test_unknown_paths_and_methods_get_openais_error(server, method, path, status):
    json_body = {"json": {}} if method == "POST" else {}
    response = server.client.request(method, path, **json_body)
    error_of(response, status)
    assert response.headers["x-request-id"].startswith("req-")


def test_head_has_a_status_and_no_body(server):
    response = server.client.head("/v1/models")
    assert response.status_code == 405 and response.content == b""


def test_metrics_count_what_happened(server):
    page = server.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    before = server.metric("aquila_pd_new_tokens_total")
    used = server.chat("say<abc>").json()["usage"]["completion_tokens"]
    assert server.metric("aquila_pd_new_tokens_total") == before + used
    assert 'route="/v1/chat/completions",status="200"' in server.client.get("/metrics").text
    server.client.get("/" + "x" * 30)
    assert "xxx" not in server.client.get("/metrics").text


def test_no_answer_holds_a_number_that_json_has_not(server, monkeypatch):
    from aquila_pd.generation import TokenLogprob

    def tiny(token, params):
        return TokenLogprob(token, float("-inf"), ((token, float("-inf")),))

    monkeypatch.setattr(server.service.engine, "logprob", tiny)
    text = server.complete("hi", logprobs=1, echo=True).text
    assert json.loads(text, parse_constant=pytest.fail)["choices"][0]["logprobs"]["token_logprobs"][1] == -9999.0
