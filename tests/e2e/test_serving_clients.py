"""Real clients of the server with a real, tiny model behind it: OpenAI's SDK, and lm_eval's local-completions."""

import asyncio
import json
import math
import re
import shutil
import subprocess

import chat_factory
import numpy as np
import pytest
from paths import ROOT
from serving_factory import Brake, chat_body, running, sse, wait_for

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "你好, please introduce yourself."}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from aquila_pd.text.loading import load

    return load(
        chat_factory.tiny_chat_folder(tmp_path_factory.mktemp("served") / "tiny", "aquila-v1"), slots=4, threads=1
    )


@pytest.fixture(scope="module")
def server(loaded, tmp_path_factory):
    with running(loaded, tmp_path_factory.mktemp("log") / "log", max_queue=64) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(loaded, ids: list[int], count: int, **more) -> list:
    """What the engine draws, asked directly: the sequences of one prompt."""
    from aquila_pd.generation import SamplingParams

    params = SamplingParams(temperature=0, max_new_tokens=count, stop_ids=loaded.prompts.stop_ids, **more)
    return loaded.engine.generate([ids], params)[0]


def text_of(loaded, ids: list[int]) -> str:
    return loaded.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


@pytest.fixture(scope="module")
def expected(loaded):
    """The greedy answer to MESSAGES, of an engine of its own: the server's belongs to the server's thread."""
    from types import SimpleNamespace

    from aquila_pd.generation import Engine

    apart = SimpleNamespace(engine=Engine(loaded.model, slots=1), prompts=loaded.prompts)
    (sequence,) = greedy(apart, loaded.prompts.encode(MESSAGES), 20, logprobs=3)
    return sequence


# ---------------------------------------------------------------------------------------------------- OpenAI's SDK


def test_the_sdk_gets_what_the_engine_draws(loaded, client, expected):
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    assert found.choices[0].message.content == text_of(loaded, expected.tokens)
    assert found.choices[0].finish_reason == expected.finish_reason == "length"
    assert found.usage.completion_tokens == 20 and found.usage.prompt_tokens == len(expected.prompt)
    other = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=2, seed=3, max_tokens=20)
    assert other.choices[0].message.content != found.choices[0].message.content, "control: sampling draws others"


def test_the_sdk_streams_the_same_text(loaded, client, expected):
    with client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_of(loaded, expected.tokens)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_async_sdk_runs_many_at_once(loaded, server, expected):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(stream: bool) -> str:
                asked = dict(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
                if not stream:
                    return (await client.chat.completions.create(**asked)).choices[0].message.content
                chunks = await client.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(one(i % 2 == 0) for i in range(12)))

    assert set(asyncio.run(main())) == {text_of(loaded, expected.tokens)}


def test_the_sdk_leaves_a_stream_and_the_server_notices(server, client):
    before = server.service.engine.stats.finished["cancelled"]
    with Brake(server, steps=3):
        with client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, logit_bias={"319": -100}
        ) as stream:
            next(iter(stream))
        wait_for(lambda: not server.service.running)
    wait_for(server.quiet)
    assert server.service.engine.stats.finished["cancelled"] == before + 1


def test_logprobs_are_the_models(client, expected, loaded):
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=20, logprobs=True, top_logprobs=3
    )
    entries = found.choices[0].logprobs.content
    kept = [one for one in expected.logprobs if one.id not in (chat_factory.EOS, chat_factory.CLS)]
    assert len(entries) == len(kept)
    for entry, one in zip(entries, kept, strict=True):
        assert math.isclose(entry.logprob, one.logprob, abs_tol=1e-4)  # batches round differently
        assert [round(top.logprob, 3) for top in entry.top_logprobs] == [round(p, 3) for _, p in one.top]
    data = bytes(byte for entry in entries for byte in entry.bytes)
    assert data.decode(errors="replace").lstrip() == found.choices[0].message.content


def test_a_seed_repeats_an_answer_and_n_gives_several(client):
    asked = dict(model="tiny", messages=MESSAGES, max_tokens=12, n=3, seed=11)
    texts = [[c.message.content for c in client.chat.completions.create(**asked).choices] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    other = client.chat.completions.create(**{**asked, "seed": 12})
    assert [c.message.content for c in other.choices] != texts[0]


def test_a_second_turn_reuses_the_first_ones_prompt(client):
    first = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog, please."}]
    answer = client.chat.completions.create(model="tiny", messages=first, max_tokens=8, temperature=0)
    turns = [*first, answer.choices[0].message.model_dump(), {"role": "user", "content": "go on"}]
    again = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8, temperature=0)
    assert 16 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    several = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8, n=3)
    assert several.usage.prompt_tokens_details.cached_tokens < several.usage.prompt_tokens == again.usage.prompt_tokens


def test_the_sdk_knows_our_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[{"type": "function"}])
    assert refused.value.code == "unsupported_parameter" and refused.value.request_id.startswith("req-")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert refused.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_extensions_go_through_extra_body(client):
    found = client.completions.create(
        model="tiny", prompt="hello", max_tokens=5, temperature=1, extra_body={"top_k": 1}
    )
    best = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0)
    assert found.choices[0].text == best.choices[0].text


def test_a_biased_token_is_drawn_and_a_banned_one_never(client, loaded):
    (wanted,) = loaded.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    found = client.completions.create(
        model="tiny", prompt="hello", max_tokens=6, logit_bias={str(wanted): 100}, logprobs=1, temperature=1
    )
    text = found.choices[0].logprobs.tokens[0]
    assert found.choices[0].logprobs.tokens == [text] * 6
    banned = client.completions.create(
        model="tiny", prompt="hello", max_tokens=6, logit_bias={str(wanted): -100}, logprobs=1, temperature=0
    )
    assert text not in banned.choices[0].logprobs.tokens


# -------------------------------------------------------------------------------------------------------- lm_eval


def direct(loaded, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation and whether it is the greedy one, from the model's logits of the whole text."""
    import paddle

    ids = context + continuation
    with paddle.no_grad():
        logits = loaded.model(paddle.to_tensor([ids]))
    logits = (logits[0] if isinstance(logits, tuple) else logits).numpy()[0].astype(np.float64)
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    rows = logprobs[len(context) - 1 : -1]
    total = sum(row[token] for row, token in zip(rows, continuation, strict=True))
    return float(total), all(row.argmax() == token for row, token in zip(rows, continuation, strict=True))


def test_lm_evals_loglikelihoods_are_the_models(server, loaded, expected):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", max_length=200, num_concurrent=1, batch_size=4
    )
    assert model.tokenizer_backend == "remote", "lm_eval finds the tokenizer here, and needs no files"
    pairs = [("Hello, please", " introduce yourself."), ("你好，", "请介绍一下北京。"), ("The quick", " brown fox 🙂"),
             ("a", "b c d e f g"), ("北京是", "中国的首都")]  # fmt: skip
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ids = loaded.tokenizer
    answers = model.loglikelihood(requests)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, answers, strict=True):
        whole = ids(context + continuation)["input_ids"]
        start = len(ids(context)["input_ids"])
        wanted, wanted_greedy = direct(loaded, whole[:start], whole[start:])
        assert math.isclose(logprob, wanted, abs_tol=1e-3), (continuation, logprob, wanted)
        assert is_greedy == wanted_greedy
        shifted, _ = direct(loaded, whole[: start - 1] or whole[:1], whole[start - 1 or 1 :])
        assert start == 1 or abs(shifted - wanted) > 0.1, "control: one token further would be another number"


def test_a_greedy_continuation_is_seen_as_one(server, loaded):
    from types import SimpleNamespace

    from aquila_pd.generation import Engine

    apart = SimpleNamespace(engine=Engine(loaded.model, slots=1), prompts=loaded.prompts)
    prompt = loaded.tokenizer("Hello")["input_ids"]
    drawn = greedy(apart, prompt, 5)[0].tokens
    for continuation, best in ((drawn, True), ([*drawn[:-1], (drawn[-1] + 1) % 300], False)):
        body = {"prompt": [prompt + continuation], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        (choice,) = server.client.post("/v1/completions", json=body).json()["choices"]
        found = choice["logprobs"]
        rows = list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[len(prompt) : -1]
        assert all(p == max(top.values()) for p, top in rows) is best
        wanted, _ = direct(loaded, prompt, continuation)
        assert math.isclose(sum(p for p, _ in rows), wanted, abs_tol=1e-3)


def test_lm_eval_generates_until_a_stop_string(server, client):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(model="tiny", base_url=f"{server.url}/v1/completions", max_length=200)
    plain = client.completions.create(model="tiny", prompt="Hello", max_tokens=30, temperature=0).choices[0].text
    stop = plain[5:7]
    request = Instance("generate_until", {}, ("Hello", {"until": [stop], "max_gen_toks": 30}), 0)
    assert model.generate_until([request]) == [plain.split(stop)[0]]


# ----------------------------------------------------------------------------------------- damage in a real model


def test_a_nan_weight_ends_who_meets_it_and_nobody_else(tmp_path):
    import paddle

    from aquila_pd.text.loading import load

    loaded = load(chat_factory.tiny_chat_folder(tmp_path / "tiny", "aquila-v1"), slots=4, threads=1)
    (bad,) = loaded.tokenizer("@")["input_ids"]
    weight = loaded.model.aquila.embed_tokens.weight
    values = weight.numpy()
    values[bad] = np.nan
    weight.set_value(paddle.to_tensor(values))
    with running(loaded, tmp_path / "log") as server:
        good = chat_body("hello", max_tokens=5, temperature=0, logit_bias={str(bad): -100})
        assert server.client.post("/v1/chat/completions", json=good).status_code == 200
        for stream in (False, True):
            response = server.chat("an @ in it", max_tokens=5, stream=stream)
            assert response.status_code == 500 and response.json()["error"]["code"] == "nonfinite_logits"
        response = server.complete("an @ in it", echo=True, logprobs=1, max_tokens=0)
        assert response.json()["error"]["code"] == "nonfinite_logits"
        again = server.client.post("/v1/chat/completions", json=good)
        assert again.status_code == 200 and server.metric("aquila_pd_nonfinite_logits_total") == 3
        assert json.loads(again.text, parse_constant=pytest.fail)


def test_an_exception_in_the_model_is_survived(server, loaded, monkeypatch, client):
    real = loaded.engine._runner.hidden
    monkeypatch.setattr(loaded.engine._runner, "hidden", lambda *rest: 1 / 0)
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)
    assert failed.value.code == "engine_error"
    monkeypatch.setattr(loaded.engine._runner, "hidden", real)
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5).usage.completion_tokens > 0
    assert server.client.get("/health").status_code == 200


# ------------------------------------------------------------------------------------------------- SentencePiece


def test_a_sentencepiece_model_is_served_too(tmp_path):
    from aquila_pd.text.loading import load

    loaded = load(chat_factory.tiny_ziya_folder(tmp_path / "ziya"), slots=2, threads=1)
    with running(loaded, tmp_path / "log") as server:
        text = server.chat("hello world", max_tokens=12, temperature=0).json()["choices"][0]["message"]["content"]
        events = sse(server.chat("hello world", max_tokens=12, temperature=0, stream=True).text)[:-1]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
        (choice,) = server.complete("hello 你好 🙂", echo=True, logprobs=1, max_tokens=3, temperature=0).json()[
            "choices"
        ]
        assert choice["text"].startswith("hello 你好 🙂")
        assert "bytes:\\xf0" in choice["logprobs"]["tokens"], "the emoji is no piece: it goes by bytes"


# ---------------------------------------------------------------------------------------------- docs/serving.md


def snippets(language: str) -> list[str]:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_snippets_of_the_documentation_run(server, capsys):
    (program,) = snippets("python")
    program = program.replace("http://127.0.0.1:8000", server.url).replace("AquilaChat2-34B-PD", "tiny")
    exec(compile(program, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    (curl,) = (block for block in snippets("bash") if block.startswith("curl"))
    if shutil.which("curl"):
        done = subprocess.run(
            ["bash", "-c", curl.replace("http://127.0.0.1:8000", server.url)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert sse(done.stdout)[-1] == "[DONE]", done


def test_the_documentation_names_every_option_and_every_parameter(server):
    from aquila_pd.serving.command import parser
    from aquila_pd.serving.protocol import ChatRequest, CompletionRequest, SeedRequest

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    options = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    assert {option for option in options - {"--help"} if f"`{option}`" not in text} == set()
    refused = {name for model in (ChatRequest, CompletionRequest) for name, field in model.model_fields.items()
               if (field.description or "").startswith("Not supported")}  # fmt: skip
    names = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *SeedRequest.model_fields} - refused
    assert {name for name in names if f"`{name}" not in text} == set()
    routes = {route.path.replace("{model:path}", "NAME") for route in server.server.config.app.routes}
    assert {path for path in routes if path not in text} == set()
