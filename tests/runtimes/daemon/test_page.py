"""The daemon's page in Chromium: light and dark, on a phone, by keyboard, without an error in the console."""

import re
import shutil

import pytest

from runtimes.daemon import keys
from runtimes.daemon.app import PAGE
from runtimes.daemon.config import KeySettings
from tests.runtimes.daemon.test_openai import CHAT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_asks_nobody_else():
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", PAGE) == []
    addresses = set(re.findall(r"\bhttps?://[^\"' ]*", PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a format, which nobody fetches
    assert not re.search(r"@import|url\(|innerHTML|eval\(", PAGE)


def test_its_policy_allows_its_own_code_alone(running):
    policy = running.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as found:
        opened = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, ...): a page, and the errors of its console."""
    contexts, errors = [], []

    def make(url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield make, errors
    for context in contexts:
        context.close()


def contrast(page, selector):
    """The contrast of a text with the background behind it, after WCAG."""
    return page.evaluate(
        """(selector) => {
            const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
            const light = (color) => {
                const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
                const [r, g, b] = color.map((v) => linear(v / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const item = document.querySelector(selector);
            let behind = item;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const a = light(rgb(getComputedStyle(item).color));
            const b = light(rgb(getComputedStyle(behind).backgroundColor));
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_shows_the_models(running, open_page, scheme):
    make, errors = open_page
    running.post("/v1/chat/completions", CHAT)
    page = make(running.url, color_scheme=scheme)
    toy = page.locator('[data-model="toy"]')
    toy.locator("text=tokens/s").first.wait_for()
    page.locator("#state", has_text="ready").wait_for()
    texts = dict(zip(toy.locator("dt").all_inner_texts(), toy.locator("dd").all_inner_texts(), strict=True))
    assert texts["cache blocks in use"] == "0 of 128"
    assert int(texts["answers that ended"]) >= 1
    assert toy.locator(".state").inner_text() == "ready"
    assert "Memory: models" in page.locator("#memory").inner_text()
    for selector in ("dt", "dd", "#summary", ".card .state", "#state", "h2"):
        assert contrast(page, selector) >= 4.5, selector
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (scheme == "dark") == (sum(map(int, re.findall(r"\d+", dark))) < 200)
    running.post("/v1/chat/completions", CHAT)
    toy.locator("dd:last-child", has_text=str(int(texts["answers that ended"]) + 1)).wait_for()
    assert errors == []


def test_it_fits_a_phone(running, open_page):
    make, errors = open_page
    page = make(running.url, viewport={"width": 320, "height": 640})
    page.locator('[data-model="toy"] dd').first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert errors == []


def test_the_keyboard_reaches_it(running, open_page):
    make, errors = open_page
    page = make(running.url)
    page.locator('[data-model="toy"] dd').first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pause"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator("#pause").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    assert page.locator("#pause").get_attribute("aria-pressed") == "false"
    assert errors == []


def test_it_asks_for_the_key(start, open_page, tmp_path):
    make, errors = open_page
    key, line = keys.new_key("one")
    (tmp_path / "keys").write_text(line)
    with start(keys=KeySettings(file=str(tmp_path / "keys"))) as running:
        page = make(running.url)
        page.locator("#key").wait_for()
        assert page.locator("article").count() == 0
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.locator('[data-model="toy"] dd').first.wait_for()
        assert not page.locator("#login").is_visible()
        assert errors == []


def test_it_says_when_the_server_is_gone(start, open_page):
    make, _ = open_page
    with start() as running:
        page = make(running.url)
        page.locator('[data-model="toy"] dd').first.wait_for()
    page.locator("#state", has_text="the server does not answer").wait_for()


def test_a_name_of_a_model_is_text(start, open_page, model_files):
    """The page writes texts of models as texts: an error may quote anything."""
    make, errors = open_page
    with start() as running:
        running.daemon.models.entries["toy"].error = "<img src=x onerror=alert(1)><b>bold</b>"
        page = make(running.url)
        page.locator('[data-model="toy"] dd').first.wait_for()
        assert "<b>bold</b>" in page.locator('[data-model="toy"] .error').inner_text()
        assert page.locator("img, b").count() == 0
        assert errors == []
