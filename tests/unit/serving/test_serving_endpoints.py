"""Completions with echo and log-probabilities, and the smaller endpoints, on an engine whose answers are known."""

import json

import chat_factory
import fake_engine
import pytest
from serving_factory import chat_body, error_of, running, spied, sse

from aquila_pd.chat.predict import messages_of

EOS = chat_factory.EOS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = fake_engine.fake_model(chat_factory.write_aquila_tokenizer(folder / "tokenizer"))
    with running(model, folder / "log", max_body=20_000) as server:
        yield server


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


def test_a_special_token_in_an_answer_has_a_place_and_no_length(server):
    (choice,) = server.complete("say<a[CLS]b>", logprobs=0).json()["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["a", "[CLS]", "b"] and choice["logprobs"]["text_offset"] == [0, 1, 1]


def test_the_drawn_token_is_among_the_likeliest_even_when_it_is_not(server):
    from aquila_pd.generation import TokenLogprob
    from aquila_pd.serving.vocabulary import legacy_logprobs

    a, b, c = (server.service.ids_of(letter)[0] for letter in "abc")
    found = legacy_logprobs([(a, TokenLogprob(a, -3.0, ((b, -0.1), (c, -2.0))), 0)], 1, server.service.vocabulary)
    assert found["top_logprobs"] == [{"b": -0.1, "a": -3.0}]


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
    history = [["old" * 85, "x"], ["new", "y"]]
    found = server.client.post("/", json={"prompt": "say<z>", "history": history, "max_gen_len": 100}).json()
    assert found["response"] == "z"
    (prompt, params), encode = seen[0], server.service.prompts.encode
    everything = [*messages_of(history, "say<z>")]
    assert 256 - 100 < len(encode(everything)) < 256, "it would fit without the answer"
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
    chat = server.chat(logprobs=True, top_logprobs=1).text
    entry = json.loads(chat, parse_constant=pytest.fail)["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0
    text = server.complete("hi", logprobs=1, echo=True).text
    assert json.loads(text, parse_constant=pytest.fail)["choices"][0]["logprobs"]["token_logprobs"][1] == -9999.0
