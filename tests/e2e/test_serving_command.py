"""`aquila-pd serve` as a process: its first line, its signals, its exit status, and what it refuses to start with."""

import json
import os
import signal
import socket
import threading

import chat_factory
import httpx
import pytest
from serving_factory import PATIENCE, Command, chat_body, wait_for

from aquila_pd.serving.command import is_loopback, main, parser, settings_of, size, warn_if_open
from aquila_pd.serving.server import ServerError, listen
from aquila_pd.utils.errors import ConfigError

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_factory.write_aquila_tokenizer(tmp_path_factory.mktemp("served") / "my-model")


def settings(*arguments: str, **environment: str):
    return settings_of(parser().parse_args(["folder/my-model", *arguments]), environment)


# ------------------------------------------------------------------------------------------------------ arguments


def test_defaults_are_for_this_machine_only():
    args = parser().parse_args(["x"])
    assert (args.host, args.port) == ("127.0.0.1", 8000)
    found = settings()
    assert (found.name, found.api_key, found.cors_origins) == ("my-model", None, ())


def test_the_key_comes_from_the_environment_unless_given():
    assert settings(AQUILA_PD_API_KEY="env").api_key == "env"
    assert settings("--api-key", "arg", AQUILA_PD_API_KEY="env").api_key == "arg"


@pytest.mark.parametrize("key", ["", "  ", "schlüssel"])
def test_a_key_that_is_no_lock_is_refused(key):
    for found in (lambda: settings("--api-key", key), lambda: settings(AQUILA_PD_API_KEY=key)):
        with pytest.raises(ConfigError, match="AQUILA_PD_API_KEY"):
            found()


@pytest.mark.parametrize(("text", "value"), [("512", 512), ("2K", 2048), ("4m", 4 * 2**20), ("1G", 2**30)])
def test_sizes_have_units(text, value):
    assert size(text) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "70000"],
        ["--port", "-1"],
        ["--slots", "0"],
        ["--max-body", "x"],
        ["--max-body", "K"],
        ["--request-timeout", "nan"],
        ["--max-queue", "1.5"],
    ],
)
def test_wrong_arguments_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["x", *arguments])
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_names_of_the_server_are_known():
    assert "name.example" in settings("--allow-host", "Name.Example").hosts
    assert "box.local" in settings("--host", "box.local").hosts
    assert socket.gethostname().lower() in settings().hosts


def test_only_an_open_door_without_a_key_is_warned_about(capsys):
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert is_loopback(host)
        warn_if_open(host, settings())
    warn_if_open("0.0.0.0", settings("--api-key", "k"))
    assert capsys.readouterr().err == ""
    for host in ("0.0.0.0", "::", "192.168.0.1", "box"):
        warn_if_open(host, settings())
        assert "WARNING" in capsys.readouterr().err


def test_a_port_in_use_is_one_clear_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {number}"):
            listen("127.0.0.1", number)
        assert main(["no-folder", "--port", str(number)]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and str(number) in err and "--port" in err


def test_a_folder_that_is_none_is_status_1(tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), "--port", "0"]) == 1
    assert "nothing does not exist" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- signals


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url: str, content: str = "slow endless"):
        super().__init__()
        self.url, self.content, self.lines, self.begun = url, content, [], threading.Event()
        self.start()
        assert self.begun.wait(PATIENCE)

    def run(self) -> None:
        body = chat_body(self.content, stream=True)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)
                    self.begun.set()

    def last_event(self) -> dict:
        self.join(PATIENCE)
        assert self.lines[-1] == "data: [DONE]"
        return json.loads(self.lines[-2].removeprefix("data: "))


def test_sigterm_in_the_middle_of_streams_ends_them_properly(folder):
    with Command(folder, "--shutdown-grace", "600") as server:
        assert server.line.startswith("Serving my-model at http://127.0.0.1:")
        long, short = Stream(server.url), Stream(server.url, "slow say<short answer>")
        server.process.send_signal(signal.SIGTERM)
        assert short.last_event()["choices"][0]["finish_reason"] == "stop", "it was given the time"
        assert long.is_alive()
        status, err = server.stop()
        assert long.last_event()["error"]["code"] == "server_stopping"
    assert status == 0
    assert "Traceback" not in err and "Stopping" in err


def test_a_second_signal_does_not_wait_and_nobody_has_to_read_the_log(folder):
    with Command(folder, "--shutdown-grace", "600") as server:
        server.process.stderr.close()
        stream = Stream(server.url)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert stream.is_alive(), "control: one signal lets it go on"
        server.process.send_signal(signal.SIGINT)
        assert stream.last_event()["error"]["code"] == "server_stopping"
        assert server.process.wait(PATIENCE) == 0


@needs_dev_full
def test_a_log_on_a_full_disk_and_a_key_from_the_environment(folder):
    with Command(folder, "--log-file", "/dev/full", "--name", "served", AQUILA_PD_API_KEY="k-1") as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["authorization"] = "Bearer k-1"
            assert client.get("/v1/models").json()["data"][0]["id"] == "served"
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=chat_body()).status_code == 200
        status, err = server.stop(signal.SIGINT)
    assert (status, err) == (0, "")
