"""The Space as a visitor meets it, in a real browser: desktop and phone, light and dark, and people who mean harm."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace

import pytest
from gradio_client import Client
from playwright.sync_api import expect

from hf_context_prune.publishing.space.example import Example
from hf_context_prune.publishing.space.folder import write_space
from hf_context_prune.publishing.space.settings import Entry, Limits, Settings, Source, read_space_settings
from hf_context_prune.publishing.space.store import ModelStore
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
    store.run(80)  # of 122: the streamer holds symbols back until the next space
    for _ in range(15):
        time.sleep(0.3)  # the page is shown a text when 0.08 s have passed since the one before, at the end of a step
        store.let(1)
        early = {kind: (written(page, kind), page.inner_text(f"#{kind}-stats")) for kind in ("dense", "pruned")}
        if all(text for text, _ in early.values()):
            break
    assert all(text for text, _ in early.values())
    # On a busy machine one model may write all of its text first: the one that has used less time goes next.
    unfinished = [kind for kind, (_, stats) in early.items() if not re.search(r"written\s*60", stats)]
    assert unfinished
    store.release()
    wait_for_status(page, "times as fast")
    for kind, (text, _) in early.items():  # streamed: what was there stayed, and more came
        assert written(page, kind).startswith(text)
        assert len(written(page, kind)) > len(text) or kind not in unfinished
        stats = page.inner_text(f"#{kind}-stats")
        assert re.search(r"tokens/s\s*[\d.]+\s+first token\s*[\d.]+ s\s+weights\s*\d+ MB\s+written\s*60", stats)
    page.get_by_text("What was lost, token by token").wait_for()
    both = (page.inner_text("#surprise .pieces"), f"the patient was given the dose{written(page, 'dense')}")
    coloured, told = (re.sub(r"\W", "", text) for text in both)  # HTML has other spaces and no control characters
    assert coloured == told
    assert is_within_the_screen(page)
    page.screenshot(path=ARTIFACTS / f"space-{screen}.png", full_page=True)
    assert page.get_by_role("tab", name="Questions", exact=True).count() == 0  # no report has any
    for tab, words in (
        ("Removed", "MLP neurons"),
        ("Widths", "of the MLP neurons are gone"),
        ("Domains", "own domain"),
    ):
        page.get_by_role("tab", name=tab, exact=True).click()
        page.get_by_text(words).locator("visible=true").first.wait_for()
        assert is_within_the_screen(page)
        page.screenshot(path=ARTIFACTS / f"space-{screen}-{tab.lower()}.png", full_page=True)


@pytest.fixture(scope="module")
def finished(tiny_space, tmp_path_factory):
    """A written Space with two sizes of one domain and a finished example of each, and its address."""
    models, base = tiny_space, Source(path=tiny_space / "base")
    entries = [
        Entry(f"Law, {name}", Source(path=models / name), base, (f"the court {name}", "is it?"), domain="Law")
        for name in ("uniform", "variable")
    ]
    folder = tmp_path_factory.mktemp("space") / "out"
    settings = read_space_settings(write_space(Settings("Sizes", tuple(entries)), folder) / "space.yaml")
    with serving(settings, ModelStore()) as address:
        yield settings, address


def test_the_page_opens_with_a_finished_example_of_each_size(visit, finished):
    settings, address = finished
    page = visit(address)
    examples = [Example.load(entry.example) for entry in settings.entries]
    assert page.input_value("#prompt textarea") == examples[0].prompt == "the court uniform"
    assert "A finished example" in page.inner_text("#status")
    assert written(page, "pruned") == examples[0].view.sides[1].progress.text.lstrip()
    assert page.inner_text("#surprise .pieces").startswith("the court uniform")
    assert "Loss on Law text" in page.inner_text("#headline")
    assert "MLP neurons" in page.inner_text("#headline")
    assert page.get_by_role("tab", name="Widths").count() == 0  # one width for all layers
    assert page.get_by_role("radio", name="Law").count() == 0  # a choice of one is none
    assert page.get_by_role("button", name="Stop").is_disabled()
    page.get_by_role("slider", name="Size of the pruned model").press("ArrowRight")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'the court variable'")
    page.wait_for_function("document.querySelector('#headline').innerText.includes('attention heads')")
    assert page.inner_text("#surprise .pieces").startswith("the court variable")
    page.get_by_role("tab", name="Widths").wait_for()
    page.click("#run")
    wait_for_status(page, "^The pruned model wrote")
    assert written(page, "pruned").startswith(examples[1].view.sides[1].progress.text.strip())
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()  # a moment after the status


def test_a_phone_shows_one_model_at_a_time(visit, finished):
    page = visit(finished[1], "phone-light")
    assert page.locator("#pruned-text").is_visible()
    assert not page.locator("#dense-text").is_visible()
    page.get_by_role("radio", name="Dense", exact=True).check()
    page.locator("#dense-text").wait_for()
    assert not page.locator("#pruned-text").is_visible()
    page.get_by_role("tab", name="Removed", exact=True).click()
    page.locator("#removed tbody tr").first.scroll_into_view_if_needed()
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('#removed td')].map(x => x.getBoundingClientRect().right))"
    )
    assert right <= 390  # no figure is out of sight
    page.screenshot(path=ARTIFACTS / "space-phone-dense.png", full_page=True)
    page = visit(finished[1])
    assert page.locator("#dense-text").is_visible()
    assert page.locator("#pruned-text").is_visible()
    assert not page.locator("#which").is_visible()


def test_every_control_has_a_name(visit, finished):
    page = visit(finished[1])
    page.get_by_role("button", name="Options").click()
    page.get_by_role("slider", name="Temperature").wait_for()
    names = {}
    for role in ("textbox", "radio", "slider", "spinbutton", "button", "tab", "radiogroup", "region"):
        for control in page.get_by_role(role).all():
            shown = control.aria_snapshot().splitlines()[0]
            names.setdefault(role, []).append(shown)
            assert re.match(rf'- \'?{role} ".+"', shown), shown
            assert not re.search(r'"(Radio|Textbox|Slider|Dataset)"', shown), shown
    assert len(names["textbox"]) == 3
    groups = page.locator("fieldset").evaluate_all("all => all.map(group => group.ariaLabel)")
    assert "What the models do with it" in groups
    assert all(groups)


def test_only_the_text_is_compared(visit):
    page = visit()
    page.get_by_label("Only compare my text").check()
    page.fill("#prompt textarea", "the court finds\n that <b>the party</b> has a duty")
    page.click("#run")
    page.locator("#surprise .pieces").wait_for()
    assert page.locator("#surprise .pieces").text_content() == "the court finds\n that <b>the party</b> has a duty"
    assert written(page, "dense") == written(page, "pruned") == ""
    assert page.locator("#surprise .pieces span[title]").count() > 5


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
    page.wait_for_function("document.querySelector('#mode input[value=\"Chat\"]').checked")


def test_a_chat_goes_on(visit):
    page = visit()
    page.get_by_label("Chat", exact=True).check()
    for number, question in enumerate(("the court?", "the dose?"), 1):
        page.fill("#prompt textarea", question)
        page.click("#run")
        wait_for_status(page, "times as fast")
        page.wait_for_function("document.querySelector('#prompt textarea').value == ''")
        for kind in ("dense", "pruned"):
            assert written(page, kind).count("You: ") == number
            assert f"You: {question}" in written(page, kind)
    page.get_by_role("button", name="New chat").click()
    page.wait_for_function("document.querySelector('#dense-text textarea').value == ''")
    page.fill("#prompt textarea", "the party?")
    page.click("#run")
    wait_for_status(page, "times as fast")
    page.wait_for_function("document.querySelector('#prompt textarea').value == ''")
    assert written(page, "dense").count("You: ") == 1
    page.get_by_label("Continue the text").check()
    page.get_by_role("button", name="New chat").wait_for(state="hidden")


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
        store.run(4)
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
