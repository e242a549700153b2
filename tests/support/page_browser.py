"""The chat page in a real browser, as a pytest plugin: fixtures `page_server` and `tab`, `open_tab`, `open_url`.

The browser is Debian's chromium, headless. Every test runs under the Content-Security-Policy the page is served with,
and ends with two questions: did anything leave the page's own origin, and did the console show an error that the test
did not expect?
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from page_server import MODEL, PATIENCE, PageServer

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox",  # test machines run as root
    "--disable-gpu",
    "--disable-background-networking",  # this and the next: the browser must not talk to its maker
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)


@pytest.fixture(scope="module")
def chat_browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page was tested")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium): no page was tested")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield running
        running.close()


@pytest.fixture
def page_server() -> Iterator[PageServer]:
    with PageServer() as running:
        yield running


class Tab:
    """The page as a person uses it."""

    def __init__(self, context, url: str, model: str) -> None:
        self.context, self.url = context, url
        self.refusals_expected = False
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("console", lambda said: self.console.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.see("#model", model)

    def expect_refusals(self) -> None:
        """The browser itself logs a status of 400 and above, and a connection that breaks, as an error."""
        self.refusals_expected = True

    def see(self, selector: str, text: str | re.Pattern) -> None:
        """Wait until the element has exactly this text (or one that a pattern finds)."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(text, timeout=PATIENCE * 1000)

    def wait(self, expression: str) -> None:
        """Until it is true in the page. The driver's own way of waiting needs eval, which the page's policy forbids."""
        end = time.monotonic() + PATIENCE
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            self.page.wait_for_timeout(20)

    def say(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def ask(self, text: str) -> None:
        """Say it and wait for the end of the answer."""
        self.say(text)
        self.rest()

    def rest(self) -> None:
        self.page.wait_for_selector("body:not(.busy)")

    def answers(self) -> list[str]:
        return self.page.locator(".assistant .body").all_inner_texts()

    def set(self, **values: str) -> None:
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"#set-{name}", value)
        self.page.get_by_role("button", name="Done").click()

    def text_field(self) -> str:
        return self.page.input_value("#input")

    def strangers(self) -> list[str]:
        return [url for url in self.requests if not url.startswith((f"{self.url}/", "data:"))]

    def unexpected(self) -> list[str]:
        return [line for line in self.console if not (self.refusals_expected and "Failed to load resource" in line)]


@pytest.fixture
def open_url(chat_browser) -> Iterator[Callable[..., Tab]]:
    """open_url(url, model, **options of the browser's context) -> a Tab of any server's page."""
    tabs = []

    def open_one(url: str, model: str, **options: object) -> Tab:
        context = chat_browser.new_context(**{"locale": "en-US", "viewport": {"width": 1000, "height": 700}, **options})
        tabs.append(Tab(context, url, model))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        strangers, unexpected = tab.strangers(), tab.unexpected()
        tab.context.close()
        assert strangers == []
        assert unexpected == []


@pytest.fixture
def open_tab(open_url, page_server) -> Callable[..., Tab]:
    return lambda **options: open_url(page_server.url, MODEL, **options)


@pytest.fixture
def tab(open_tab) -> Tab:
    return open_tab()
