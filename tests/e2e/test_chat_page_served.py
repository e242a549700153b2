"""The chat page as `aquila-pd serve` serves it, with a tiny model behind it: the two speak the same language."""

import re

import pytest
from chat_factory import tiny_chat_folder
from serving_factory import Brake, Running, running, wait_for

from aquila_pd.text.loading import load

pytest_plugins = ("page_browser",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_folder(tmp_path_factory.mktemp("page") / "tiny", "aquila-chat")


def served(folder, **settings):
    return running(load(folder, slots=2), folder.with_name("log"), **settings)


def tab_of(open_url, server: Running, title: str = "tiny"):
    return open_url(server.url.rstrip("/"), title)


def test_turns_retry_and_settings_with_the_real_server(folder, open_url):
    with served(folder) as server:
        tab = tab_of(open_url, server)
        tab.see("#context", "256 tokens of context")
        tab.set(temperature="0", max_tokens="12", system="你是一名助手。")
        tab.ask("你好，请介绍一下北京。")
        tab.see(".assistant .note", re.compile(r"\d+ tokens read, 12 written in \d+\.\d s"))
        first = tab.answers()
        tab.page.click(".foot .again")
        tab.rest()
        assert tab.answers() == first  # temperature 0: the same again
        tab.set(temperature="1", seed="7")
        tab.ask("And in English? 🙂")
        assert tab.page.locator("#trouble").is_hidden()
        notes = tab.page.locator(".assistant .note").all_inner_texts()
        first_prompt, second_prompt = (int(re.search(r"(\d+) tokens read", note)[1]) for note in notes)
        assert second_prompt > first_prompt + 12  # the first turn is part of it
        wait_for(server.quiet)


def test_stop_frees_the_engine_and_a_full_context_is_explained(folder, open_url):
    with served(folder) as server:
        tab = tab_of(open_url, server)
        tab.set(temperature="2", seed="1")
        with Brake(server, steps=20):  # far from the end of the answer, whenever the button is pressed
            tab.say("写很多字")
            tab.wait("document.querySelector('.assistant .body').textContent.length > 3")
            tab.page.click("#go")
            wait_for(lambda: not server.service.running)
        wait_for(server.quiet)
        tab.see(".assistant .note", "Stopped.")
        tab.expect_refusals()
        tab.say("word " * 300)
        tab.see("#trouble-what", re.compile("do not fit into the model"))
        assert "This model's context is 256 tokens" in tab.page.locator("#trouble-detail").inner_text()
        assert tab.text_field() == "word " * 300


def test_the_real_server_asks_for_its_key(folder, open_url):
    with served(folder, api_key="secret-1") as server:
        tab = tab_of(open_url, server, title="Aquila")
        tab.expect_refusals()
        tab.see("#trouble-what", "This server asks for an API key.")
        tab.set(key="secret-1", max_tokens="3")
        tab.see("#model", "tiny")
        assert tab.page.locator("#trouble").is_hidden()
        tab.ask("hello")
        tab.see(".assistant .note", re.compile("3 written"))
