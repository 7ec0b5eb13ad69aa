"""The Space as a visitor meets it, in a real browser: desktop and phone, light and dark, and people who mean harm."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
from gradio_client import Client

from hf_context_prune.publishing.space.settings import Limits
from tests.browser.conftest import ARTIFACTS
from tests.support.space_models import HeldStore, serving, settings_of

pytestmark = pytest.mark.slow

LIMITS = Limits(new_tokens=60, prompt_characters=400, waiting=2)
HOSTILE = '<img src=x onerror="window.hacked=1"> **bold** <script>window.hacked=1</script> ${window.hacked=1}'
SCREENS = {
    "desktop-light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "desktop-dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone-light": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "phone-dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}


@pytest.fixture(scope="module")
def store():
    return HeldStore()


@pytest.fixture(scope="module")
def url(tiny_space, store):
    with serving(settings_of(tiny_space, limits=LIMITS), store) as address:
        yield address


@pytest.fixture
def visit(chromium, url):
    """Opens the page, and says afterwards what it did that it should not have."""
    pages, foreign, broken = [], [], []

    def go(address=url, screen="desktop-light"):
        page = chromium.new_context(**SCREENS[screen]).new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: foreign.append(request.url) if "//127.0.0.1" not in request.url else None)
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#run")
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.context.close()
    assert not [address for address in foreign if not address.startswith(("data:", "blob:"))]
    assert broken == []


def written(page, kind):
    return page.input_value(f"#{kind}-text textarea")


def wait_for_status(page, pattern):
    page.wait_for_function(
        "pattern => new RegExp(pattern).test(document.querySelector('#status').innerText)", arg=pattern
    )


def is_within_the_screen(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("screen", SCREENS)
def test_a_visitor_compares_and_reads_on(visit, store, screen):
    page = visit(screen=screen)
    page.get_by_label("Medicine", exact=True).check()
    page.wait_for_function("document.querySelector('#examples').innerText.includes('the patient was given')")
    page.get_by_role("button", name="the patient was given").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value != ''")
    page.fill("#prompt textarea", "the patient was given the dose")
    store.hold()
    page.click("#run")
    store.let(80)  # of 122: the streamer holds symbols back until the next space
    page.wait_for_function(
        "['dense', 'pruned'].every(kind => document.querySelector(`#${kind}-text textarea`).value.length > 0)"
    )
    early = {kind: written(page, kind) for kind in ("dense", "pruned")}
    store.release()
    wait_for_status(page, "times as fast")
    for kind, text in early.items():  # streamed: what was there stayed, and more came
        assert written(page, kind).startswith(text)
        assert len(written(page, kind)) > len(text)
        stats = page.inner_text(f"#{kind}-stats")
        assert re.search(r"tokens/s\s+[\d.]+\s+first token\s+[\d.]+ s\s+weights\s+\d+ MB\s+written\s+60", stats)
    assert is_within_the_screen(page)
    page.screenshot(path=ARTIFACTS / f"space-{screen}.png", full_page=True)
    for tab, words in (
        ("Removed", "MLP neurons"),
        ("Widths", "layer by layer"),
        ("Domains", "own domain"),
        ("Questions", "No report has multiple-choice questions"),
    ):
        page.get_by_role("tab", name=tab, exact=True).click()
        page.get_by_text(words).locator("visible=true").first.wait_for()
        assert is_within_the_screen(page)
        page.screenshot(path=ARTIFACTS / f"space-{screen}-{tab.lower()}.png", full_page=True)


def test_a_domain_that_is_down_says_why(visit):
    page = visit()
    page.get_by_label("Lost").check()
    page.get_by_text("There is no folder").locator("visible=true").first.wait_for()
    page.fill("#prompt textarea", "the court")
    page.click("#run")
    page.wait_for_function("document.querySelector('#pruned-text textarea').value.includes('does not exist')")
    wait_for_status(page, "Done")
    assert written(page, "dense")


def test_a_question_is_put_as_one(visit):
    page = visit()
    page.get_by_role("button", name="is the patient given the dose?").click()
    page.wait_for_function("document.querySelector('#mode input[value=\"Answer\"]').checked")


def test_too_much_text_and_markup(visit):
    page = visit()
    page.fill("#prompt textarea", "x" * 50_000)
    page.click("#run")
    wait_for_status(page, "50,000 characters.*at most 400")
    page.fill("#prompt textarea", "  ")
    page.click("#run")
    wait_for_status(page, "There is no text")
    page.fill("#prompt textarea", HOSTILE)
    page.click("#run")
    wait_for_status(page, "times as fast")
    assert page.evaluate("window.hacked") is None


def test_what_a_model_and_a_repository_say_is_text(chromium, visit, tiny_space):
    settings = settings_of(tiny_space, limits=LIMITS)
    entry = replace(settings.entries[0], name=HOSTILE[:55], prompts=(HOSTILE,))
    settings = replace(settings, title=HOSTILE, entries=(entry,))
    with serving(settings, HeldStore(decode=HOSTILE)) as address:
        page = visit(address)
        page.locator("#examples button").first.click()
        page.wait_for_function("document.querySelector('#prompt textarea').value != ''")
        page.click("#run")
        wait_for_status(page, "times as fast")
        assert written(page, "dense") == written(page, "pruned") == HOSTILE
        assert page.inner_text("h1") == HOSTILE
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[src=x]").count() == 0


def test_a_crowd_meets_a_kind_word(visit, url, store):
    page, waiting, clients = visit(), visit(), [Client(url, verbose=False) for _ in range(3)]
    store.hold()
    jobs = [clients[0].submit("Law", "the court", new_tokens=3, api_name="/compare")]
    store.waits.acquire(timeout=60)
    jobs.append(clients[1].submit("Law", "the court", new_tokens=3, api_name="/compare"))
    waiting.fill("#prompt textarea", "the court")
    waiting.click("#run")
    wait_for_status(waiting, "queue: [12]/2")
    for _ in range(30):
        page.fill("#prompt textarea", "the court")
        page.click("#run")
    page.get_by_text("currently busy. Please try again").first.wait_for()
    page.screenshot(path=ARTIFACTS / "space-busy.png")
    store.release()
    for job in jobs:
        assert job.result(timeout=60)["dense"]["tokens"] == 3
    wait_for_status(waiting, "times as fast")
    page.click("#run")  # the page lives on
    wait_for_status(page, "times as fast")


def test_stop_and_leaving_end_the_writing(visit, url, store):
    page = visit()
    page.fill("#prompt textarea", "the court finds")
    for leave in (lambda: page.click("#stop"), page.close):
        before = store.steps
        store.hold()
        page.click("#run")
        store.let(4)
        for _ in range(5):
            store.waits.acquire(timeout=60)
        leave()
        Client(url, verbose=False)  # a round trip: the server has seen what went before
        done = threading.Event()
        other = Client(url, verbose=False).submit(
            "Law", "the court", new_tokens=1, api_name="/compare", result_callbacks=[lambda *_, done=done: done.set()]
        )
        while not done.wait(0.5):  # the other's turn comes early only if the first one is over
            store.let(1)
        assert other.result(timeout=60)["dense"]["tokens"] == 1
        assert store.steps - before < 100  # of 122
        store.release()
