"""The chat page for everybody: the file itself, languages, settings, keyboard, screen readers, small windows."""

import re
from html.parser import HTMLParser

import pytest
from page_server import MODEL, refuse, stream

from aquila_pd.serving.page import read_page

pytest_plugins = ("page_browser",)


# ---- The file -------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes


def test_the_file_needs_no_unsafe_inline_and_names_nothing_outside():
    text = read_page()[0].decode()
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    assert [name for name, _ in reader.attributes if name.startswith("on") or name == "style"] == []
    assert [
        value for name, value in reader.attributes if name in ("src", "href") and value[:5] not in ("data:", "#mark")
    ] == []
    assert set(re.findall(r"https?://[^'\"\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_both_languages_have_the_same_words(tab):
    differing = """() => {
        const places = (words) => [...words.matchAll(/\\{\\w+\\}/g)].map(String).sort().join();
        const keys = new Set([...Object.keys(WORDS.en), ...Object.keys(WORDS.zh)]);
        const same = ({ en, zh }, key) => en[key] && zh[key] && places(en[key]) === places(zh[key]);
        return [...keys].filter((key) => !same(WORDS, key));
    }"""
    assert tab.page.evaluate(differing) == []


def test_a_chinese_browser_gets_chinese_labels(open_tab):
    tab = open_tab(locale="zh-CN")
    tab.see("#go", "发送")
    tab.see("#new-chat", "新对话")
    assert tab.page.get_attribute("html", "lang") == "zh-CN"


# ---- Settings -------------------------------------------------------------------------------------------------------


def test_settings_are_sent_as_they_are_set(tab, page_server):
    page_server.answers += [stream("a"), stream("b"), stream("c")]
    tab.ask("with defaults")
    tab.set(system="你是一名老师。", temperature="0", top_p="0.5", max_tokens="20", seed="7")
    tab.ask("with settings")
    tab.page.click("#open-settings")
    tab.page.click("#defaults")
    tab.page.get_by_role("button", name="Done").click()
    tab.ask("with defaults again")
    names = ("temperature", "top_p", "max_tokens", "seed")
    assert [{name: body.get(name) for name in names} for body in page_server.asked] == [
        {"temperature": 1, "top_p": 0.9, "max_tokens": None, "seed": None},
        {"temperature": 0, "top_p": 0.5, "max_tokens": 20, "seed": 7},
        {"temperature": 1, "top_p": 0.9, "max_tokens": None, "seed": None},
    ]
    assert not {"seed", "max_tokens"} & set(page_server.asked[0])
    assert [body["messages"][0]["content"] for body in page_server.asked] == [
        "with defaults",
        "你是一名老师。",
        "with defaults",
    ]


def test_impossible_settings_are_not_taken_and_cancel_changes_nothing(tab):
    before = tab.page.evaluate("settings")
    for name, value in (
        ("temperature", "3"),
        ("top_p", "0"),
        ("max_tokens", "1.5"),
        ("seed", "-1"),
        ("temperature", ""),
    ):
        tab.set(**{name: value})
        assert tab.page.locator("#settings").is_visible()
        tab.page.click("#cancel")
    tab.page.click("#open-settings")
    tab.page.fill("#set-temperature", "0.5")
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("settings") == before


@pytest.mark.parametrize("kept", ["{", "17", '{"temperature": 9, "top_p": "x", "max_tokens": [], "seed": 5}', "null"])
def test_remembered_settings_that_are_not_ours_are_replaced_by_defaults(tab, kept):
    tab.page.evaluate("(kept) => localStorage.setItem(SETTINGS, kept)", kept)
    tab.page.reload()
    tab.see("#model", MODEL)
    seed = 5 if "seed" in kept else None
    expected = {"system": "", "temperature": 1, "top_p": 0.9, "max_tokens": None, "seed": seed}
    assert tab.page.evaluate("settings") == expected


def test_a_browser_that_keeps_no_data_can_chat_all_the_same(tab, page_server):
    forbidden = "{ get() { throw new DOMException('no', 'SecurityError'); } }"
    for storage in ("localStorage", "sessionStorage"):
        tab.page.add_init_script(f"Object.defineProperty(window, '{storage}', {forbidden})")
    tab.page.reload()
    page_server.answers.append(stream("好"))
    tab.ask("hello")
    assert tab.answers() == ["好"]
    tab.page.click("#open-settings")
    assert tab.page.locator("#not-remembered").is_visible()


# ---- For everybody --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(360, 640), (1400, 900)])
def test_nothing_is_wider_than_the_window(open_tab, page_server, width, height):
    tab = open_tab(viewport={"width": width, "height": height})
    page_server.answers.append(stream("word" * 200, "\n```\n", "code" * 200, "\n```\n"))
    tab.ask("question" * 100)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.page.evaluate("at('scroller').scrollWidth <= at('scroller').clientWidth")
    tab.page.click("#open-settings")
    assert tab.page.evaluate("at('fields').scrollWidth <= at('fields').clientWidth")
    box = tab.page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height


def test_the_page_can_be_used_by_keyboard_and_is_told_to_a_screen_reader(tab, page_server):
    page_server.answers.append(stream("好"))
    tab.page.get_by_role("textbox", name="Message").fill("hello")
    tab.page.get_by_role("button", name="Send").click()
    tab.rest()
    assert "好" in tab.page.get_by_role("status").text_content()
    tab.page.get_by_role("button", name="Settings").press("Enter")
    dialog = tab.page.get_by_role("dialog", name="Settings")
    for label in ("System message", "Temperature", "Top p", "Longest answer", "Seed", "API key"):
        control = dialog.get_by_label(label)
        hint = control.get_attribute("aria-describedby")
        assert len(tab.page.locator(f"#{hint}").inner_text()) > 20
    tab.page.keyboard.press("Escape")
    tab.page.get_by_role("main", name="Conversation").focus()
    named = "(b) => b.ariaLabel || b.textContent.trim() || b.closest('[hidden]')"
    assert tab.page.evaluate(f"[...document.querySelectorAll('button')].every({named})")


CONTRAST = """(selectors) => selectors.map((selector) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    const light = (colour) => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        const colour = getComputedStyle(element).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : colour;
    };
    const element = document.querySelector(selector);
    const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(open_tab, page_server, scheme):
    tab = open_tab(color_scheme=scheme)
    tab.expect_refusals()
    page_server.answers += [stream("text\n```\ncode\n```"), refuse(500, "no")]
    tab.ask("question")
    tab.ask("again")
    tab.see("#trouble-detail", "no")
    seen = (
        ".user .text",
        ".assistant .text",
        "code",
        ".code span",
        ".note",
        "#context",
        "#keys",
        "#go",
        "#trouble-what",
        "#trouble-detail",
    )
    ratios = dict(zip(seen, tab.page.evaluate(CONTRAST, list(seen)), strict=True))
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}  # WCAG AA for small text
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 247)", "dark": "rgb(22, 25, 27)"}[scheme]
