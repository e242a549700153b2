"""Streams as they go over the wire, and requests that end early: clients hang up or stall, time or room runs out."""

import json
import socket
import threading

import chat_factory
import fake_engine
import httpx
import pytest
from serving_factory import PATIENCE, Brake, chat_body, in_lockstep, raw_request, running, sse, wait_for

from aquila_pd.serving.engine_worker import Job, Worker
from aquila_pd.serving.errors import timed_out


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return chat_factory.write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def serve(tokenizer_folder, tmp_path):
    """serve(engine options..., settings=...) -> a running server."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(*, engine=None, **settings):
            model = fake_engine.fake_model(tokenizer_folder, **(engine or {}))
            return stack.enter_context(running(model, tmp_path / f"log{len(list(tmp_path.iterdir()))}", **settings))

        yield start


@pytest.fixture(scope="module")
def server(tokenizer_folder, tmp_path_factory):
    model = fake_engine.fake_model(tokenizer_folder, step_seconds=0.002)
    with running(model, tmp_path_factory.mktemp("log") / "log") as server:
        yield server


def received(connection: socket.socket) -> bytes:
    """All bytes until the server closes."""
    data = b""
    with connection:
        while part := connection.recv(65536):
            data += part
    return data


def unchunked(body: bytes) -> bytes:
    """The content of a body in HTTP's chunked coding, taken apart by hand."""
    content = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            assert body == b"\r\n"
            return content
        content += body[: int(size, 16)]
        assert body[int(size, 16) :].startswith(b"\r\n")
        body = body[int(size, 16) + 2 :]


# -------------------------------------------------------------------------------------------------------- framing


@pytest.mark.parametrize("usage", [False, True])
def test_a_chat_stream_byte_by_byte(server, usage):
    body = chat_body("say<你>", stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))
    connection = raw_request(server.port, "/v1/chat/completions", body, headers="Connection: close\r\n")
    head, _, rest = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/event-stream; charset=utf-8" in head.lower()
    content = unchunked(rest)
    first = json.loads(content.split(b"\n\n")[0].removeprefix(b"data: "))
    begin = (
        f'{{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},"model":"tiny",'
        f'"system_fingerprint":"aquila_pd-0.1.0","choices":['
    )
    middle = '],"usage":null}\n\n' if usage else "]}\n\n"
    prompt = len(server.service.prompts.encode(body["messages"]))
    answer = len(server.service.ids_of("你")) + 1
    expected = "".join(
        f'data: {begin}{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}{middle}'
        for delta, reason in [
            ('{"role":"assistant","content":"","refusal":null}', "null"),
            ('{"content":"你"}', "null"),
            ("{}", '"stop"'),
        ]
    )
    if usage:
        expected += (
            f'data: {begin}],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{answer},'
            f'"total_tokens":{prompt + answer},"prompt_tokens_details":{{"cached_tokens":0}}}}}}\n\n'
        )
    assert content.decode() == expected + "data: [DONE]\n\n"


def test_a_completion_stream_has_texts_and_an_empty_last_one(server):
    events = sse(server.complete("say<ab>", stream=True, stream_options={"include_usage": True}).text)
    assert events[-1] == "[DONE]" and events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] == 3
    choices = [event["choices"][0] for event in events[:-2]]
    assert "".join(c["text"] for c in choices) == "ab" and choices[0]["finish_reason"] is None
    assert (choices[-1]["text"], choices[-1]["finish_reason"]) == ("", "stop")
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events[:-1]}) == 1


def test_every_choice_of_a_stream_begins_with_its_role_and_ends_with_its_reason(server):
    events = sse(server.chat("say<abc>", n=3, stream=True).text)
    for index in range(3):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant" and mine[0]["delta"]["content"] == ""
        assert "".join(c["delta"].get("content", "") for c in mine) == "abc"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"] and mine[-1]["delta"] == {}


def test_no_chunk_ends_inside_a_character(server):
    text = "👨‍👩‍👧 你好 🙂🙃"
    with in_lockstep(server):
        events = sse(server.chat(f"say<{text}>", stream=True).text)[:-1]
    parts = [e["choices"][0]["delta"].get("content", "") for e in events]
    assert "".join(parts) == text and "�" not in "".join(parts)
    assert len([part for part in parts if part]) > 1, "control: it did come in pieces"


def test_a_stream_comes_while_it_is_made(serve):
    server = serve()
    body = chat_body("endless", stream=True)
    with Brake(server, steps=2), server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {") and not server.quiet()
    wait_for(server.quiet)


# ---------------------------------------------------------------------------------------------- errors in streams


def test_an_error_before_the_first_token_is_no_stream(server):
    response = server.chat("nan<0>", stream=True)
    assert response.status_code == 500 and response.json()["error"]["code"] == "nonfinite_logits"


@pytest.mark.parametrize(("fault", "code"), [("nan<9>", "nonfinite_logits"), ("boom<9>", "engine_error")])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_error_in_the_middle_is_an_event_and_then_the_end(server, fault, code, path):
    text = f"endless {fault}"
    body = chat_body(text, stream=True) if "chat" in path else {"prompt": text, "stream": True}
    with in_lockstep(server):
        events = sse(server.client.post(path, json=body).text)
    assert events[-1] == "[DONE]" and events[-2]["error"]["code"] == code
    assert all("error" not in event for event in events[:-2]) and len(events) > 3
    assert server.chat().status_code == 200


def test_a_mistake_of_our_own_in_a_stream_is_told_and_logged(server, monkeypatch):
    from aquila_pd.serving.api import chat

    def broken(self, *rest, **more):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(chat.Reply, "_chunk", broken)
    events = sse(server.chat(stream=True).text)
    assert events[0]["error"]["code"] == "internal_error" and events[-1] == "[DONE]"
    wait_for(lambda: "ZeroDivisionError: a mistake" in server.log_file.read_text())
    monkeypatch.undo()
    assert server.chat().status_code == 200
    wait_for(server.quiet)


# ------------------------------------------------------------------------------------------------ hanging up


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot_at_once(serve, stream):
    server = serve(engine={"step_seconds": 0.01, "max_length": 100_000})
    connection = raw_request(server.port, "/v1/chat/completions", chat_body("endless", stream=stream))
    wait_for(lambda: server.service.engine.stats.new_tokens > 3)
    connection.close()
    wait_for(server.quiet)
    assert server.service.engine.cancelled == 1
    assert server.service.engine.stats.new_tokens < 50_000, "control: left alone, it would go on for 100,000"
    wait_for(lambda: "499" in server.log_file.read_text())
    assert "client_gone" in server.log_file.read_text()


def test_control_a_client_that_stays_is_not_cut(serve):
    server = serve(engine={"step_seconds": 0.01})
    used = server.chat("endless", max_tokens=40).json()["usage"]
    assert used["completion_tokens"] == 40 and server.service.engine.cancelled == 0


def test_all_choices_of_a_request_go_when_its_client_does(serve):
    server = serve(engine={"step_seconds": 0.01, "max_length": 100_000, "slots": 2})
    connection = raw_request(server.port, "/v1/completions", {"prompt": ["endless"] * 3, "n": 2, "max_tokens": 50_000})
    wait_for(lambda: server.service.engine.stats.waiting == 4)
    connection.close()
    wait_for(server.quiet)
    assert server.service.engine.cancelled == 6


# ------------------------------------------------------------------------------------------------ slow readers


def test_a_reader_that_takes_nothing_is_cut_off(serve):
    server = serve(engine={"max_length": 1_000_000}, stall_timeout=0.3)
    body = chat_body("endless", stream=True, logprobs=True, top_logprobs=20, max_tokens=9000)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(data) + data)  # fmt: skip
    wait_for(lambda: "reader_stalled" in server.log_file.read_text())
    wait_for(server.quiet)
    wait_for(
        lambda: not [c for c in server.server.server_state.connections if c.scope and c.scope["path"] != "/health"]
    )
    assert not received(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), (
        "what the client finds is no whole answer"
    )


def test_pieces_that_nobody_takes_are_joined(server):
    from aquila_pd.generation import SamplingParams
    from aquila_pd.serving.choices import Piece

    async def main():
        job = Job([[1]], SamplingParams(), None)
        for _ in range(1000):
            job.deliver(Piece(0, "ab"))
        assert len(job._pieces) == 1
        job.deliver(Piece(0, "", finish_reason="stop"))
        return [piece async for piece in job.pieces()]

    import asyncio

    (piece,) = asyncio.run(main())
    assert piece.text == "ab" * 1000 and piece.finish_reason == "stop"


# ------------------------------------------------------------------------------------------- limits of time and room


def test_a_request_has_a_time_limit(serve):
    server = serve(engine={"step_seconds": 0.01, "max_length": 100_000}, request_timeout=0.3)
    response = server.chat("endless")
    assert response.status_code == 504 and response.json()["error"]["code"] == "request_timeout"
    assert response.headers["x-should-retry"] == "false"
    wait_for(server.quiet)


def test_a_stream_whose_time_is_up_ends_with_an_event(serve):
    server = serve(engine={"step_seconds": 0.01, "max_length": 100_000})
    with server.client.stream("POST", "/v1/chat/completions", json=chat_body("endless", stream=True)) as response:
        lines = response.iter_lines()
        first = next(lines)
        (request,) = server.service.running  # what its timer does, now that the stream has begun
        server.service.worker._loop.call_soon_threadsafe(request.fail, timed_out(0.3))
        rest = [line for line in lines if line]
    assert response.status_code == 200 and "chat.completion.chunk" in first
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert rest[-1] == "data: [DONE]"
    wait_for(server.quiet)
    assert server.chat("say<x>").status_code == 200


def test_a_full_queue_answers_429_and_when_to_come_again(serve):
    server = serve(engine={"step_seconds": 0.01, "max_length": 100_000, "slots": 2}, slots=2, max_queue=1)
    held = [raw_request(server.port, "/v1/chat/completions", chat_body("endless", stream=True)) for _ in range(3)]
    wait_for(lambda: len(server.service.running) == 3)
    response = server.chat("say<x>")
    assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
    assert response.json()["error"]["code"] == "queue_full"
    assert server.metric("aquila_pd_rejected_total") == 1
    held.pop().close()
    wait_for(lambda: len(server.service.running) == 2)
    assert server.chat("say<x>", n=2).status_code == 429, "one place is free, not two"
    for connection in held:
        connection.close()
    wait_for(server.quiet)
    assert server.chat("say<x>").status_code == 200


def test_many_clients_at_once_each_get_their_own_answer(serve):
    server = serve(slots=4, max_queue=100)
    answers = {}

    def ask(i: int) -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            response = client.post("/v1/chat/completions", json=chat_body(f"say<number {i}>", stream=i % 2 == 0))
        if i % 2:
            answers[i] = response.json()["choices"][0]["message"]["content"]
        else:
            deltas = [event["choices"][0]["delta"] for event in sse(response.text)[:-1]]
            answers[i] = "".join(delta.get("content", "") for delta in deltas)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"number {i}" for i in range(40)}
    wait_for(server.quiet)


# --------------------------------------------------------------------------------------------------------- the end


def test_stopping_lets_answers_finish_and_refuses_new_ones(serve):
    server = serve(shutdown_grace=PATIENCE)
    body = {"prompt": "endless", "max_tokens": 50, "stream": True}
    with Brake(server, steps=3) as brake, server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as other:
            assert other.get("/health").status_code == 200
            server.service.worker._loop.call_soon_threadsafe(server.server.leave)
            wait_for(lambda: server.service.stopping)
            refused = other.post("/v1/chat/completions", json=chat_body())
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_stopping"
            assert other.get("/health").status_code == 503
        brake.allow(47)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_stopping_ends_answers_that_take_too_long_with_a_last_event(serve):
    server = serve(engine={"step_seconds": 0.02, "max_length": 100_000}, shutdown_grace=0.2)
    whole = {}
    waiting = threading.Thread(target=lambda: whole.update(r=httpx.post(
        f"{server.url}/v1/chat/completions", json=chat_body("endless"), timeout=PATIENCE)))  # fmt: skip
    waiting.start()
    with server.client.stream("POST", "/v1/chat/completions", json=chat_body("endless", stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        wait_for(lambda: len(server.service.running) == 2)
        server.service.worker._loop.call_soon_threadsafe(server.server.leave)
        rest = [line for line in lines if line]
    waiting.join()
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert whole["r"].status_code == 503 and whole["r"].json()["error"]["code"] == "server_stopping"


# ------------------------------------------------------------------------------------------------------ the worker


def test_what_a_step_brings_crosses_to_the_event_loop_in_one_call(tokenizer_folder):
    """Otherwise eight answers would wake the loop eight times a step."""
    import asyncio

    from aquila_pd.generation import SamplingParams
    from aquila_pd.serving.choices import Piece

    model = fake_engine.fake_model(tokenizer_folder)

    class OneToken:
        def __init__(self, number):
            self.number, self.done = number, False

        def take(self, event):
            self.done = event.finish_reason is not None
            return Piece(self.number, "x", finish_reason=event.finish_reason)

    async def main() -> list[int]:
        worker, calls = Worker(model.engine, on_error=pytest.fail), []
        loop = asyncio.get_running_loop()
        worker.start()
        job = Job([[5], [6], [7]], SamplingParams(max_new_tokens=4), OneToken)
        hand_over = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda f, batch: calls.append(len(batch)) or hand_over(f, batch)
        worker.submit(job)
        pieces = [piece async for piece in job.pieces()]
        del loop.call_soon_threadsafe
        worker.stop()
        assert await asyncio.to_thread(worker._thread.join, 5) is None
        assert "".join(piece.text for piece in pieces) == "x" * 12
        return calls

    assert asyncio.run(main()) == [3, 3, 3, 3]


def test_the_event_loop_does_not_wait_for_a_step(serve):
    server = serve()
    with Brake(server):
        connection = raw_request(server.port, "/v1/chat/completions", chat_body("endless", stream=True))
        wait_for(lambda: server.service.engine.stats.waiting == 1)
        for _ in range(5):
            assert server.client.get("/health").status_code == 200
        assert server.service.engine.stats.steps == 0, "five answers came while the engine was in its first step"
        connection.close()
    wait_for(server.quiet)
