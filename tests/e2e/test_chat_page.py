"""The chat page in a real browser: streaming, turns, typing, and text that stays text."""

import re
import threading

from page_server import MODEL, Gate, chunk, endless, event, refuse, stream, stream_then

pytest_plugins = ("page_browser",)

ATTACKS = (
    "<img src=x onerror=\"window.hacked = 'img'\"><script>window.hacked = 'script'</script>"
    "<svg onload=\"window.hacked = 'svg'\"></svg><a href=\"javascript:window.hacked='a'\">a</a>"
)


# ---- Streaming ------------------------------------------------------------------------------------------------------


def test_text_grows_while_it_streams_and_no_half_character_is_shown(tab, page_server):
    half, rest = Gate(), Gate()
    smile = chunk("🙂京")
    cut = smile.index("🙂".encode()) + 2  # in the middle of the four bytes
    page_server.answers.append(stream("北", half, smile[:cut], rest, smile[cut:], "！"))
    tab.say("你好")
    tab.see(".assistant .body", "北")
    tab.see("#go", "Stop")
    half.open()
    tab.page.wait_for_timeout(100)  # the half character has arrived by now; if not, the test is only weaker
    assert tab.answers() == ["北"]
    rest.open()
    tab.see(".assistant .body", "北🙂京！")
    tab.see(".assistant .note", re.compile(r"^12 tokens read, 34 written in \d+\.\d s \(\d+\.\d tokens/s\)$"))
    tab.see("#go", "Send")


READ = """async ([bytes, size, naive]) => {
    const parts = [];
    for (let i = 0; i < bytes.length; i += size) parts.push(new Uint8Array(bytes.slice(i, i + size)));
    const events = [];
    if (naive) {  // what a page does that decodes and splits each chunk by itself
        for (const part of parts) {
            const lines = new TextDecoder().decode(part).split("\\n");
            events.push(...lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)));
        }
        return events;
    }
    const source = new ReadableStream({
        start(queue) { parts.forEach((part) => queue.enqueue(part)); queue.close(); },
    });
    for await (const data of readEvents(source)) events.push(data);
    return events;
}"""


def test_a_stream_cut_anywhere_gives_the_same_events(tab):
    text = (
        ': comment\ndata: {"a": "北京🙂"}\n\n'
        "event: x\r\nid: 1\r\ndata:two\r\ndata: lines\r\n\r\n"
        "data: mac\r\rdata\n\ndata: cut off"
    )
    expected = ['{"a": "北京🙂"}', "two\nlines", "mac"]
    sizes = range(1, 30)
    assert all(tab.page.evaluate(READ, [list(text.encode()), size, False]) == expected for size in sizes)
    assert any(tab.page.evaluate(READ, [list(text.encode()), size, True]) != expected for size in sizes)


def test_stop_hangs_up_and_keeps_the_text(tab, page_server):
    heard = threading.Event()
    page_server.answers.append(endless("字", heard))
    tab.say("写很多字")
    tab.wait("document.querySelector('.assistant .body').textContent.length > 5")
    assert not heard.is_set()
    tab.page.click("#go")
    assert heard.wait(30)
    tab.see(".assistant .note", "Stopped.")
    assert re.fullmatch("字{6,}", tab.answers()[0])
    assert tab.page.locator("#trouble").is_hidden()

    page_server.answers.append(stream("好"))
    tab.ask("继续")
    assert [message["role"] for message in page_server.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert page_server.asked[1]["messages"][1]["content"] == tab.answers()[0]


def test_escape_stops_and_a_question_without_an_answer_goes_back_to_the_text_field(tab, page_server):
    gate = Gate()
    page_server.answers.append(stream(gate, "too late"))
    tab.say("Wait a moment")
    tab.page.wait_for_selector(".busy")
    tab.page.fill("#input", "and more")
    tab.page.keyboard.press("Escape")
    tab.rest()
    gate.open()
    assert tab.text_field() == "Wait a moment\nand more"
    assert tab.page.locator(".message").count() == 0
    assert tab.page.locator("#welcome").is_visible()


def test_a_double_click_on_send_does_not_stop_the_answer(tab, page_server):
    gate = Gate()
    page_server.answers.append(stream("a", gate, "b"))
    tab.page.fill("#input", "question")
    tab.page.dblclick("#go")
    gate.open()
    tab.rest()
    assert tab.answers() == ["ab"]


# ---- Conversation ---------------------------------------------------------------------------------------------------


def test_each_turn_sends_the_whole_conversation(tab, page_server):
    page_server.answers += [stream("一"), stream("二"), stream("三")]
    for question in ("first", "second\nwith  two lines", "third"):
        tab.ask(question)
    body = page_server.asked[2]
    assert body["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "一"},
        {"role": "user", "content": "second\nwith  two lines"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "third"},
    ]
    assert (body["model"], body["stream"], body["stream_options"]) == (MODEL, True, {"include_usage": True})
    assert tab.page.locator(".user .text").nth(1).inner_text() == "second\nwith  two lines"


def test_retry_asks_again_and_replaces_the_last_answer(tab, page_server):
    page_server.answers += [stream("old"), stream("new")]
    tab.ask("question")
    tab.page.click(".foot .again")
    tab.see(".assistant .body", "new")
    assert page_server.asked[1]["messages"] == [{"role": "user", "content": "question"}]


def test_a_retry_that_brings_nothing_keeps_the_old_answer(tab, page_server):
    tab.expect_refusals()
    page_server.answers += [stream("old"), refuse(500, "out of luck"), stream("new")]
    tab.ask("question")
    tab.page.click(".foot .again")
    tab.see("#trouble-detail", "out of luck")
    assert (tab.answers(), tab.text_field()) == (["old"], "")
    tab.page.click("#trouble-act")
    tab.see(".assistant .body", "new")


def test_a_new_chat_forgets_and_cuts_what_was_being_written(tab, page_server):
    heard = threading.Event()
    page_server.answers += [stream("one"), endless("字", heard), stream("fresh")]
    tab.ask("first")
    tab.say("second")
    tab.wait("document.querySelectorAll('.assistant .body')[1]?.textContent.length > 2")
    tab.page.click("#new-chat")
    assert heard.wait(30)
    assert tab.page.locator(".message").count() == 0
    tab.ask("third")
    assert page_server.asked[2]["messages"] == [{"role": "user", "content": "third"}]
    assert tab.answers() == ["fresh"]


def test_a_reload_keeps_the_conversation_and_the_settings_but_no_other_tab_sees_it(tab, page_server):
    page_server.answers += [stream("一"), stream("二")]
    tab.set(temperature="0.35", max_tokens="77", system="Answer briefly.")
    tab.ask("first")
    tab.page.reload()
    assert tab.answers() == ["一"]
    tab.ask("second")
    body = page_server.asked[1]
    assert (body["temperature"], body["max_tokens"]) == (0.35, 77)
    assert [message["content"] for message in body["messages"]] == ["Answer briefly.", "first", "一", "second"]

    other = tab.context.new_page()
    other.goto(page_server.url)
    assert other.locator(".message").count() == 0
    assert other.evaluate("settings.temperature") == 0.35


def test_a_question_cut_by_a_reload_and_a_text_not_sent_are_still_there(tab, page_server):
    gate = Gate()
    page_server.answers.append(stream(gate))
    tab.say("first")
    tab.page.wait_for_selector(".busy")
    tab.page.fill("#input", "and more")
    tab.page.reload()
    gate.open()
    assert tab.text_field() == "first\nand more"


def test_an_answer_cut_by_a_reload_keeps_what_had_come(tab, page_server):
    page_server.answers.append(endless("字", threading.Event()))
    tab.say("first")
    tab.wait("document.querySelector('.assistant .body').textContent.length > 5")
    tab.page.reload()
    assert re.fullmatch("字{6,}", tab.answers()[0])
    tab.see(".assistant .note", "Stopped.")


# ---- Typing ---------------------------------------------------------------------------------------------------------


def test_enter_of_an_input_method_chooses_characters_and_does_not_send(tab, page_server):
    page_server.answers.append(stream("好"))
    keyboard = tab.context.new_cdp_session(tab.page)
    tab.page.focus("#input")
    enters = (
        "window.seen = []; at('input').addEventListener('keydown', (e) => seen.push([e.key, e.isComposing, e.keyCode]))"
    )
    tab.page.evaluate(enters)
    keyboard.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    for kind in ("rawKeyDown", "keyUp"):
        keyboard.send(
            "Input.dispatchKeyEvent", {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        )
    assert tab.page.evaluate("seen") == [["Enter", True, 13]]
    assert (tab.text_field(), page_server.asked) == ("nihao", [])
    keyboard.send("Input.insertText", {"text": "你好"})
    # Safari: the composition is over already when its Enter arrives, marked by the code 229 alone
    late = "new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true, cancelable: true})"
    assert tab.page.evaluate(f"at('input').dispatchEvent({late})") is True
    assert (tab.text_field(), page_server.asked) == ("你好", [])
    tab.page.keyboard.press("Enter")  # control: an Enter of one's own does send
    tab.rest()
    assert page_server.asked[0]["messages"] == [{"role": "user", "content": "你好"}]


def test_shift_enter_starts_a_line_and_the_field_grows(tab, page_server):
    height = "at('input').clientHeight"
    one = tab.page.evaluate(height)
    tab.page.type("#input", "one")
    for _ in range(3):
        tab.page.keyboard.press("Shift+Enter")
    tab.page.type("#input", "four")
    assert (tab.text_field(), page_server.asked) == ("one\n\n\nfour", [])
    assert tab.page.evaluate(height) > 2 * one
    tab.page.fill("#input", "\n" * 200)
    assert tab.page.evaluate(height) <= 0.4 * 700 + 1
    assert tab.page.locator("#go").is_disabled()  # nothing but white space


# ---- Text stays text ------------------------------------------------------------------------------------------------


def test_html_in_answers_questions_and_errors_stays_text(tab, page_server):
    tab.expect_refusals()
    fenced = f"```{ATTACKS}\n{ATTACKS}\n```"
    page_server.answers += [
        stream(ATTACKS, "\n", fenced),
        stream_then(event({"error": {"message": ATTACKS}}), "x"),
        refuse(400, ATTACKS),
    ]
    tab.ask(ATTACKS)
    tab.ask("second")
    tab.see("#trouble-detail", ATTACKS)
    tab.ask("third")
    tab.see("#trouble-detail", ATTACKS)
    tab.page.reload()
    assert tab.page.locator(".user .text").first.inner_text() == ATTACKS
    assert tab.page.locator(".code code").first.inner_text() == ATTACKS
    assert tab.page.locator("main :is(img, script, a, [onload], [onerror]), #trouble :is(img, script, a)").count() == 0
    assert tab.page.evaluate("window.hacked") is None


def test_the_attack_is_one_and_the_policy_alone_would_stop_it(chat_browser, page_server):
    """The control of the test above: as HTML the text runs without the policy, and with it does not."""
    # The image's own handler comes before one that is added later, so its error tells when the attack is over.
    put = """(html) => {
        document.getElementById('messages').innerHTML = html;
        const over = (done) => document.querySelector('#messages img').addEventListener('error', done);
        return new Promise(over).then(() => window.hacked);
    }"""
    outcomes = []
    for headers in ({}, page_server.page_headers):
        page_server.page_headers = headers
        page = chat_browser.new_page()
        page.goto(page_server.url)
        outcomes.append(page.evaluate(put, ATTACKS))
        page.close()
    assert outcomes[0] in ("img", "svg")
    assert outcomes[1] is None


def test_fenced_code_has_its_own_block_and_a_copy_button(tab, page_server):
    code = "def f(x):\n\n    return x  # 注释 <b>"
    answer = f"Text  with two spaces\n\n```python\n{code}\n```\nafter `inline`\n~~~~\n```\nnot closed"
    page_server.answers.append(stream(*answer))  # character by character
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=page_server.url)
    tab.ask("code")
    blocks = "[...document.querySelectorAll('.assistant .body > *')]"
    assert tab.page.evaluate(f"{blocks}.map((e) => [e.className, (e.querySelector('code') ?? e).textContent])") == [
        ["text", "Text  with two spaces"],
        ["code", code],
        ["text", "after `inline`"],
        ["code", "```\nnot closed"],
    ]
    assert tab.page.locator(".code span").all_inner_texts() == ["python", "code"]
    tab.page.locator(".code button").first.click()
    tab.see(".code button >> nth=0", "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == code
    tab.page.locator(".foot button").first.click()
    tab.see(".foot button >> nth=0", "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == answer


def test_the_view_follows_the_text_until_the_reader_scrolls_up(tab, page_server):
    more, end = Gate(), Gate()
    page_server.answers.append(stream("line\n" * 60, more, "line\n" * 60, end, "last"))
    tab.say("write")
    left = "(() => { const s = at('scroller'); return Math.round(s.scrollHeight - s.scrollTop - s.clientHeight); })()"
    tab.wait(f"at('scroller').scrollHeight > 1500 && {left} <= 2")
    tab.page.hover("#scroller")
    tab.page.mouse.wheel(0, -300)
    tab.wait(f"{left} > 200")
    top = tab.page.evaluate("at('scroller').scrollTop")
    more.open()
    tab.wait("at('scroller').scrollHeight > 3000")
    assert tab.page.evaluate("at('scroller').scrollTop") == top
    tab.page.click("#to-end")
    end.open()
    tab.rest()
    tab.wait(f"{left} <= 2")
    assert tab.page.locator("#to-end").is_hidden()
