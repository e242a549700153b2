"""Who may come in, and how much they may bring: keys, names, origins, sizes, and what a browser is told."""

import json
import re
import socket

import chat_factory
import fake_engine
import pytest
from serving_factory import chat_body, raw_request, running, wait_for

from aquila_pd.serving.guard import is_own, without_port
from aquila_pd.serving.page import policy

KEY = "sk-a-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return fake_engine.fake_model(chat_factory.write_aquila_tokenizer(folder))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with running(model, tmp_path_factory.mktemp("log") / "log", max_body=5000, hosts=("my-machine",)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(model, tmp_path_factory):
    with running(model, tmp_path_factory.mktemp("log") / "log", api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def cors(model, tmp_path_factory):
    with running(model, tmp_path_factory.mktemp("log") / "log", cors_origins=("https://friend.example",)) as server:
        yield server


def refused(response, status: int, code: str) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
    return error


# ------------------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"])
def test_without_the_key_nobody_comes_in(locked, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/")):
        more = {"json": chat_body()} if method == "POST" else {}
        response = locked.client.request(method, path, headers=headers, **more)
        refused(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}"])
def test_with_the_key_everything_is_open(locked, given):
    headers = {"authorization": given}
    assert locked.client.post("/v1/chat/completions", json=chat_body(), headers=headers).status_code == 200
    assert locked.client.get("/metrics", headers=headers).status_code == 200


def test_health_and_the_page_need_no_key(locked):
    assert locked.client.get("/health").status_code == 200
    assert locked.client.get("/").status_code == 200


def test_the_key_is_in_no_log(locked):
    locked.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    locked.client.get(f"/v1/models?key={KEY}")
    wait_for(lambda: "/v1/models 401" in locked.log_file.read_text())
    assert KEY not in locked.log_file.read_text()


# ----------------------------------------------------------------------------------------------- pages of others


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_what_a_foreign_page_may_send_unasked_is_refused(server, kind):
    """A form, or fetch without a preflight, can send these types and no other."""
    headers = {} if kind is None else {"content-type": kind}
    before = server.service.engine.stats.prompt_tokens
    for path in ("/v1/chat/completions", "/"):
        response = server.client.post(path, content=json.dumps(chat_body()), headers=headers)
        assert "application/json" in refused(response, 415, "unsupported_media_type")["message"]
    assert server.service.engine.stats.prompt_tokens == before


def test_json_may_name_its_charset(server):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (
        server.client.post("/v1/chat/completions", content=json.dumps(chat_body()), headers=headers).status_code == 200
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_a_name_that_is_not_ours_is_refused(server, host):
    """A page that has pointed its own name at 127.0.0.1 would be same-origin."""
    response = server.client.post("/v1/chat/completions", json=chat_body(), headers={"host": host})
    assert "--allow-host" in refused(response, 403, "host_not_allowed")["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "192.168.1.5", "my-machine:8000"]
)
def test_our_own_names_are_taken(server, host):
    assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_with_a_key_any_name_is_taken(locked):
    headers = {"host": "models.example.org", "authorization": f"Bearer {KEY}"}
    assert locked.client.get("/v1/models", headers=headers).status_code == 200


def test_names_are_told_from_ports():
    assert [without_port(h) for h in ("a:1", "a", "[::1]:80", "[::1]", "")] == ["a", "a", "::1", "::1", ""]
    assert is_own("::1", ()) and is_own("10.0.0.1", ()) and not is_own("a", ()) and is_own("a", ("a",))


def test_by_default_no_origin_is_allowed(server):
    headers = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    preflight = server.client.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code == 405
    response = server.client.get("/v1/models", headers={"origin": "https://friend.example"})
    assert not [
        name for answer in (preflight, response) for name in answer.headers if name.startswith("access-control")
    ]


def test_a_named_origin_may_ask(cors):
    headers = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    preflight = cors.client.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://friend.example"
    assert "content-type" in preflight.headers["access-control-allow-headers"]
    for response in (cors.chat(), cors.client.get("/nothing")):
        assert "access-control-allow-origin" not in response.headers
    with_origin = cors.client.get("/nothing", headers={"origin": "https://friend.example"})
    assert with_origin.headers["access-control-allow-origin"] == "https://friend.example"
    assert "origin" in with_origin.headers["vary"].lower()


def test_control_another_origin_may_not(cors):
    headers = {"origin": "https://foe.example", "access-control-request-method": "POST"}
    preflight = cors.client.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


# ----------------------------------------------------------------------------------------------------- sizes


def test_a_large_body_is_refused_by_its_length(server):
    response = server.chat("x" * 6000)
    assert "5,000 bytes" in refused(response, 413, "request_too_large")["message"]
    assert server.chat("say<x>").status_code == 200, "on the same connection"


def test_a_large_body_without_a_length_is_refused_while_it_comes(server):
    body = json.dumps(chat_body("x" * 6000)).encode()
    parts = (body[i : i + 1000] for i in range(0, len(body), 1000))
    headers = {"content-type": "application/json"}
    refused(server.client.post("/v1/chat/completions", content=parts, headers=headers), 413, "request_too_large")


def test_a_body_of_just_the_size_is_read(server):
    body = json.dumps(chat_body("say<x>")).encode()
    headers = {"content-type": "application/json"}
    full = body + b" " * (5000 - len(body))
    assert server.client.post("/v1/chat/completions", content=full, headers=headers).status_code == 200
    assert server.client.post("/v1/chat/completions", content=full + b" ", headers=headers).status_code == 413


def test_a_length_that_is_a_lie_is_no_way_around(server):
    with raw_request(
        server.port, "/v1/chat/completions", b"{}", headers="Content-Length: 99999999999999999999\r\n"
    ) as c:
        assert c.recv(65536).startswith(b"HTTP/1.1 4")


def test_a_body_that_never_comes_is_given_up(model, tmp_path, monkeypatch):
    from aquila_pd.serving import guard

    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with running(model, tmp_path / "log") as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 10\r\n\r\n{")  # fmt: skip
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_full_server_refuses_before_it_reads(model, tmp_path):
    with running(model, tmp_path / "log", slots=1, max_queue=1) as server:
        model.engine.step_seconds, model.engine.max_length = 0.01, 100_000
        held = [
            raw_request(server.port, "/v1/completions", {"prompt": "endless", "max_tokens": 9999}) for _ in range(2)
        ]
        wait_for(lambda: len(server.service.running) == 2)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 100\r\n\r\n")  # fmt: skip
            assert connection.recv(65536).startswith(b"HTTP/1.1 429")
        for connection in held:
            connection.close()
        wait_for(server.quiet)
        model.engine.step_seconds, model.engine.max_length = 0.0, 256


# ------------------------------------------------------------------------------------------------ for browsers


def test_every_answer_says_what_a_browser_may_not_do(server):
    for response in (server.client.get("/"), server.client.get("/nothing"), server.chat()):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere_and_its_scripts_are_the_allowed_ones(server):
    response = server.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    rules = response.headers["content-security-policy"]
    scripts = re.findall(r"<script\b[^>]*>", response.text)
    assert (
        scripts == ["<script>"] * len(scripts)
        and re.search(r"script-src[^;]*", rules)[0].count("'sha256-") == len(scripts) > 0
    )
    assert "unsafe-inline" not in rules and "http" not in rules
    assert not re.search(r"""<[^>]+\son\w+\s*=""", response.text), "handlers in attributes would not run"
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", response.text)


def test_control_a_script_that_is_not_the_pages_is_not_allowed():
    assert policy(b"<script>a</script>") != policy(b"<script>b</script>")
    assert "script-src 'none'" in policy(b"<p>no script</p>")


# ------------------------------------------------------------------------------------------------------ the log


def test_the_log_has_one_line_for_a_request(server):
    server.chat("say<logged>")
    wait_for(lambda: re.search(r"^\S+ \S+ req-\w+ POST /v1/chat/completions 200 \d+ms tokens=\d+\+7$",
                               server.log_file.read_text(), re.M))  # fmt: skip


def test_nothing_in_a_path_can_begin_a_line_of_the_log_or_steer_a_terminal(server):
    with raw_request(server.port, "/%0a2026%1b%5b31m", b"", method="GET") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
    wait_for(lambda: r"/\n2026\x1b[31m 404" in server.log_file.read_text())
    assert "\x1b" not in server.log_file.read_text()
