"""What goes wrong inside: an engine that raises, weights that are NaN, a log that cannot be written. Requests go on."""

import asyncio
import os
import threading

import chat_factory
import fake_engine
import pytest
from serving_factory import Brake, running, wait_for

from aquila_pd.serving.log import Log
from aquila_pd.text.text_stream import TextStream
from aquila_pd.utils.errors import OutputError


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return chat_factory.write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def server(tokenizer_folder, tmp_path):
    with running(fake_engine.fake_model(tokenizer_folder, step_seconds=0.005), tmp_path / "log") as server:
        yield server


def test_an_engine_that_raises_ends_what_was_running_and_nothing_else(server):
    answers = {}

    def ask(name: str, content: str, **more) -> None:
        answers[name] = server.chat(content, **more)

    others = [threading.Thread(target=ask, args=(f"other {i}", "endless")) for i in range(3)]
    everybody = [*others, threading.Thread(target=ask, args=("guilty", "boom<2>"))]
    with Brake(server):
        for thread in everybody:
            thread.start()
        wait_for(lambda: len(server.service.running) == 4)  # all are with the worker before the first step ends
    for thread in everybody:
        thread.join()
    for response in answers.values():
        assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"
        assert "boom" not in response.text, "the inside is for the log"
    assert server.service.engine.resets == 1
    wait_for(server.quiet)
    assert server.metric("aquila_pd_engine_errors_total") == 1
    assert server.chat("say<still here>").json()["choices"][0]["message"]["content"] == "still here"
    wait_for(lambda: "RuntimeError: the engine went boom" in server.log_file.read_text())
    assert "Traceback" in server.log_file.read_text()


def test_a_nan_ends_its_own_request_only(server):
    answers = {}
    other = threading.Thread(target=lambda: answers.update(other=server.chat("endless", max_tokens=100)))
    guilty = threading.Thread(target=lambda: answers.update(guilty=server.chat("nan<3>")))
    with Brake(server):
        other.start()
        guilty.start()
        wait_for(lambda: len(server.service.running) == 2)
    other.join()
    guilty.join()
    response = answers["guilty"]
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert response.json()["error"]["code"] == "nonfinite_logits" and "NaN" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    assert answers["other"].json()["usage"]["completion_tokens"] == 100
    assert server.metric("aquila_pd_nonfinite_logits_total") == 1
    assert server.metric("aquila_pd_engine_errors_total") == 0


def test_one_nan_of_several_choices_ends_the_request_and_frees_its_slots(server):
    response = server.complete(["endless", "nan<2>"], max_tokens=200)
    assert response.status_code == 500 and response.json()["error"]["code"] == "nonfinite_logits"
    wait_for(server.quiet)
    assert server.service.engine.stats.new_tokens < 100


def test_a_failed_job_leaves_the_engine_even_before_its_request_is_over(tokenizer_folder):
    """The event loop may be late; the slots are free all the same."""
    from aquila_pd.generation import SamplingParams
    from aquila_pd.serving.choices import Choice
    from aquila_pd.serving.engine_worker import Job, Worker

    model = fake_engine.fake_model(tokenizer_folder, max_length=100_000, step_seconds=0.001)
    prompts = [model.engine.ids(text) for text in ("endless", "endless nan<3>")]

    async def main() -> None:
        worker = Worker(model.engine, on_error=pytest.fail)
        worker.start()
        job = Job(
            prompts, SamplingParams(max_new_tokens=50_000), lambda i: Choice(i, TextStream(model.tokenizer), None)
        )
        worker.submit(job)
        await asyncio.to_thread(wait_for, lambda: model.engine.stats.finished["cancelled"] == 1)
        assert model.engine.stats.running == 0
        worker.stop()
        assert await worker.stopped(10)

    asyncio.run(main())


def test_the_engines_thread_is_prepared_before_its_first_step(tokenizer_folder):
    """OpenMP counts threads for each thread by itself: what the main thread has set does not hold in this one."""
    from aquila_pd.serving.engine_worker import Worker

    names: list[str] = []

    def prepare() -> None:
        names.append(threading.current_thread().name)

    async def main() -> None:
        worker = Worker(fake_engine.fake_model(tokenizer_folder).engine, on_error=pytest.fail, prepare=prepare)
        worker.start()
        worker.stop()
        assert await worker.stopped(10)

    asyncio.run(main())
    assert names == ["engine"]


def test_health_turns_bad_after_failures_in_a_row_and_good_after_a_success(server):
    for failures in range(1, 4):
        assert server.client.get("/health").status_code == 200
        server.chat("boom<0>")
        assert server.service.worker.errors == failures
    response = server.client.get("/health")
    assert response.status_code == 503 and "3 times in a row" in response.json()["reason"]
    assert server.metric("aquila_pd_healthy") == 0
    assert server.chat("say<x>").status_code == 200
    assert server.client.get("/health").status_code == 200 and server.metric("aquila_pd_healthy") == 1


def test_control_failures_with_a_success_between_are_not_in_a_row(server):
    for _ in range(3):
        server.chat("boom<0>")
        server.chat("say<x>")
    assert server.client.get("/health").status_code == 200


def test_a_reset_that_fails_too_leaves_the_server_answering(server):
    server.service.engine.reset_fails = True
    assert server.chat("boom<0>").json()["error"]["code"] == "engine_error"
    wait_for(lambda: "reset fails too" in server.log_file.read_text())
    server.service.engine.running.clear()
    assert server.chat("say<x>").status_code == 200


def test_a_text_that_cannot_be_made_ends_its_own_request(server, monkeypatch):
    from aquila_pd.serving.choices import Choice

    take = Choice.take
    (star,) = server.service.ids_of("*")
    monkeypatch.setattr(Choice, "take", lambda self, event: 1 / 0 if event.token == star else take(self, event))
    response = server.complete("say<a*b>")
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"
    wait_for(lambda: "ZeroDivisionError" in server.log_file.read_text())
    assert server.complete("say<ab>").json()["choices"][0]["text"] == "ab", "control: other tokens do no harm"
    wait_for(server.quiet)


def test_an_engine_thread_that_ended_is_told_at_once(server):
    server.service.worker.stop()
    wait_for(lambda: not server.service.worker.alive)
    assert server.client.get("/health").status_code == 503
    assert server.chat().json()["error"]["code"] == "engine_error"


# -------------------------------------------------------------------------------------------------------- the log


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_costs_log_lines_and_no_request(tokenizer_folder):
    from pathlib import Path

    with running(fake_engine.fake_model(tokenizer_folder), Path("/dev/full")) as server:
        for _ in range(5):
            assert server.chat("say<x>").status_code == 200
        assert server.chat("boom<0>").status_code == 500
        wait_for(lambda: server.metric("aquila_pd_log_lines_lost_total") > 5)


def test_control_a_log_that_can_be_written_loses_nothing(server):
    assert server.chat("say<x>").status_code == 200
    assert server.metric("aquila_pd_log_lines_lost_total") == 0


def test_a_log_that_nobody_reads_does_not_stop_anything():
    reading, writing = os.pipe()
    log = Log()
    log._out = writing  # in place of stderr: a pipe that fills up
    for i in range(12_000):
        log.line(f"line {i} " + "x" * 50)
    assert log.lost > 0
    os.close(reading)
    log.close()
    wait_for(lambda: not log._thread.is_alive())  # before its descriptor may become another file's
    os.close(writing)


def test_a_log_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(OutputError, match="no-folder"):
        Log(tmp_path / "no-folder" / "log")


def test_a_line_of_the_log_is_one_line_whatever_it_repeats(tmp_path):
    log = Log(tmp_path / "log")
    log.line("a\nb\x1b[31m")
    try:
        raise ValueError("c\nd\x1b[0m")
    except ValueError as error:
        log.exception("e", error)
    log.close()
    text = (tmp_path / "log").read_text()
    assert r"a\nb\x1b[31m" in text and "\x1b" not in text
    assert all(line[:2] == "20" or line.startswith("    ") for line in text.splitlines())
