"""The chat page when something goes wrong: every failure has a name, and nothing a person typed is lost."""

import json
import re
import threading
import time

import pytest
from page_server import MODEL, Gate, endless, event, refuse, stream, stream_then

pytest_plugins = ("page_browser",)


def test_401_asks_for_the_key_which_is_sent_and_kept_for_this_tab_only(tab, page_server):
    tab.expect_refusals()
    page_server.answers += [refuse(401, "Missing API key."), refuse(401, "Wrong API key."), stream("好")]
    tab.say("hello")
    tab.see("#trouble-what", "This server asks for an API key.")
    assert tab.text_field() == "hello"
    for key, after in (("wrong", "The server did not accept this API key."), ("secret-1", None)):
        tab.page.click("#trouble-act")
        assert tab.page.evaluate("document.activeElement.id") == "set-key"
        tab.page.keyboard.type(key)
        tab.page.keyboard.press("Enter")
        assert tab.page.evaluate("document.activeElement.id") == "input"
        tab.page.keyboard.press("Enter")
        if after:
            tab.see("#trouble-what", after)
    tab.rest()
    assert tab.answers() == ["好"]
    assert tab.page.locator("#trouble").is_hidden()
    sent = [request.headers.get("authorization") for request in page_server.received if request.method == "POST"]
    assert sent == [None, "Bearer wrong", "Bearer secret-1"]
    assert "secret-1" not in tab.page.evaluate("JSON.stringify({...localStorage})")
    assert json.loads(tab.page.evaluate("sessionStorage.getItem(KEY)")) == "secret-1"


def test_a_key_that_no_header_can_carry_is_refused_by_the_form(tab):
    tab.page.click("#open-settings")
    tab.page.fill("#set-key", "密钥")
    tab.page.get_by_role("button", name="Done").click()
    assert tab.page.locator("#settings").is_visible()
    assert tab.page.evaluate("at('set-key').validity.patternMismatch")


def test_429_says_when_to_try_again_and_counts_down(tab, page_server):
    tab.expect_refusals()
    page_server.answers += [refuse(429, "The queue is full.", retry_after="2"), stream("好")]
    tab.say("问题")
    tab.see("#trouble-what", "The server has all it can do. Try again in 2 seconds.")
    tab.see("#trouble-detail", "The queue is full.")
    assert tab.page.locator("#trouble-act").is_disabled()
    assert (tab.text_field(), tab.page.locator(".message").count()) == ("问题", 0)
    tab.page.click("#trouble-act")  # waits until the button may be pressed
    tab.see(".assistant .body", "好")
    assert tab.text_field() == ""


def test_retry_after_may_be_a_date(tab):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < tab.page.evaluate("secondsUntil", date) <= 100
    assert tab.page.evaluate("[secondsUntil('7'), secondsUntil('soon'), secondsUntil(null)]") == [7, None, None]


@pytest.mark.parametrize(
    ("answer", "what", "detail"),
    [
        (
            refuse(503, "Shutting down."),
            "The server is not ready: it is starting or shutting down. Try again in a moment.",
            None,
        ),
        (refuse(500, "NaN in the logits."), "Something went wrong in the server.", "NaN in the logits."),
        (refuse(400, "Unknown."), "The server did not take this request.", "Unknown."),
        (stream_then(None), "The connection was lost before the answer was complete.", ""),
        (stream_then(event({"error": {"message": "NaN."}})), "The server broke the answer off.", "NaN."),
        (stream_then(b"data: <html>\n\n"), "What answered is not the API this page talks to.", "<html>"),
    ],
    ids=["503", "500", "400", "lost", "error event", "no API"],
)
def test_a_failure_is_named_and_the_question_kept(tab, page_server, answer, what, detail):
    tab.expect_refusals()
    page_server.answers += [answer, stream("好")]
    tab.say("问题 1\n第二行")
    tab.see("#trouble-what", what)
    if detail is not None:
        assert tab.page.locator("#trouble-detail").text_content() == detail
    assert tab.page.locator("#trouble [role=alert]").is_visible()
    assert tab.text_field() == "问题 1\n第二行"
    tab.page.click("#trouble-act")
    tab.see(".assistant .body", "好")
    assert page_server.asked[0] == page_server.asked[1]


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (event({"error": {"message": "NaN in the logits."}}), "The server broke the answer off."),
        (None, "The connection was lost before the answer was complete."),
        (b": the end\n\n", "The connection was lost before the answer was complete."),  # no [DONE]
    ],
    ids=["error event", "connection broken", "no end"],
)
def test_an_answer_broken_in_the_middle_keeps_what_came(tab, page_server, last, what):
    tab.expect_refusals()
    seen = Gate()  # a browser throws away what it has not handed over yet when a connection breaks
    page_server.answers += [stream_then(last, "half an ans", seen), stream("whole")]
    tab.say("question")
    tab.see(".assistant .body", "half an ans")
    seen.open()
    tab.see("#trouble-what", what)
    assert tab.answers() == ["half an ans"]
    tab.see(".assistant .note", what)
    tab.page.click("#trouble-act")
    tab.see(".assistant .body", "whole")
    assert page_server.asked[1]["messages"] == [{"role": "user", "content": "question"}]


def test_after_an_error_the_page_hangs_up(tab, page_server):
    heard = threading.Event()
    page_server.answers.append(endless("字", heard, first=event({"error": {"message": "NaN."}})))
    tab.say("question")
    tab.see("#trouble-what", "The server broke the answer off.")
    assert heard.wait(30)


def test_a_server_that_is_gone_is_named_and_found_again(tab, page_server):
    tab.expect_refusals()
    tab.page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    tab.say("anybody there?")
    tab.see("#trouble-what", "The server cannot be reached. Is it running, and is this computer connected?")
    assert tab.text_field() == "anybody there?"
    tab.page.unroute("**/v1/**")
    page_server.answers.append(stream("yes"))
    tab.page.click("#trouble-act")
    tab.see(".assistant .body", "yes")


def test_a_server_that_wants_a_key_says_so_before_the_first_question(tab, page_server):
    tab.expect_refusals()
    page_server.models = refuse(401, "Missing API key.")
    tab.page.reload()
    tab.see("#trouble-what", "This server asks for an API key.")
    page_server.models = None
    tab.page.click("#trouble-act")
    tab.page.keyboard.type("secret")
    tab.page.keyboard.press("Enter")
    tab.see("#model", MODEL)
    assert tab.page.locator("#trouble").is_hidden()


def test_a_conversation_that_became_too_long_offers_a_new_chat_and_keeps_the_question(tab, page_server):
    tab.expect_refusals()
    page_server.answers += [stream("一"), refuse(400, "2,100 tokens.", "context_length_exceeded"), stream("二")]
    tab.ask("first")
    tab.say("second")
    what = "The conversation and the answer do not fit into the model. Start a new chat, or ask for less."
    tab.see("#trouble-what", what)
    tab.page.get_by_role("button", name="New chat").last.click()
    assert tab.text_field() == "second"
    tab.page.keyboard.press("Enter")
    tab.see(".assistant .body", "二")
    assert page_server.asked[2]["messages"] == [{"role": "user", "content": "second"}]


def test_an_answer_at_its_limit_says_so(tab, page_server):
    page_server.answers += [stream("half", finish="length"), stream("half", finish="length"), stream()]
    tab.ask("question")
    tab.see(".assistant .note", re.compile(r"^Ended where the model’s context is full\. 12 tokens read"))
    tab.set(max_tokens="20")
    tab.ask("a short one")
    tab.see(".assistant .note >> nth=1", re.compile(r"^Ended at the limit of 20 tokens\. 12 tokens read"))
    tab.ask("nothing to say?")
    tab.see(".assistant .note >> nth=2", re.compile(r"^The answer is empty\."))
