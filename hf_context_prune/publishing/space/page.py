"""The page of a Space: Gradio 6 blocks around `Comparer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .compare import Comparer, View
from .facts import domain_table, question_table
from .generation import CHAT, CONTINUE, MAX_TEMPERATURE, Request, Turn
from .gradio_import import import_gradio
from .html import render
from .page_models import PageModels
from .settings import Entry, Limits, Settings
from .store import ModelStore
from .views import (
    has_widths,
    headline_html,
    removed_html,
    side_html,
    side_text,
    side_values,
    span_values,
    status_html,
    surprise_html,
    table_html,
    widths_html,
)

DOMAINS_CAPTION = (
    "Change of the bits per byte against the dense model on test text, with its 95% interval or, of few sources, their "
    "range. Zero is as good as the dense model, below zero is better. Text of other domains usually suffers more."
)
QUESTIONS_CAPTION = (
    "Share of multiple-choice questions answered correctly, with the 95% interval. Near the share of guessing, a "
    "difference has no meaning."
)
_GENERATION = "generation"  # one queue for the page and the API
_FORGET_SECONDS = 3_600
_USUAL_TOKENS = 96
_NAME_GROUPS = (
    "() => document.querySelectorAll('.gradio-container fieldset').forEach(group => group.setAttribute("
    "'aria-label', group.querySelector('[data-testid=block-info]')?.textContent.trim() ?? ''))"
)
"""Gives groups of radio buttons their labels as accessible names, which Gradio leaves out."""
_QUIET: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
"""Settings of the events that only fill the page."""


@dataclass(frozen=True)
class _Form:
    """The inputs of the page, as Gradio components."""

    domain: Any
    size: Any
    prompt: Any
    examples: Any
    mode: Any
    run: Any
    stop: Any
    length: Any
    temperature: Any
    turns: Any
    new_chat: Any

    @property
    def request(self) -> list[Any]:
        """Return the inputs of a comparison, in the order of the handlers."""
        return [self.domain, self.size, self.prompt, self.mode, self.length, self.temperature, self.turns]


@dataclass(frozen=True)
class _Outputs:
    """The parts of the page that show results, as Gradio components."""

    headline: Any
    status: Any
    panels: list[Any]
    surprise: Any
    tabs: list[Any]


def build(settings: Settings, store: ModelStore | None = None) -> Any:  # noqa: ANN401 - gradio.Blocks
    """Build the blocks of a Space, to be served by [`serve`][].

    Args:
        settings: The settings of the Space.
        store: Its models; by default a new store, with nothing loaded.

    Raises:
        ConfigError: Gradio is not installed.
    """
    gr = import_gradio()
    page = PageModels(gr, settings, Comparer(settings, store or ModelStore()))
    first = settings.entries[0]
    with gr.Blocks(
        title=settings.title, analytics_enabled=False, delete_cache=(_FORGET_SECONDS, _FORGET_SECONDS)
    ) as blocks:
        gr.HTML(render("head", title=settings.title))
        domain, size = _build_choice(page)
        top = gr.HTML(headline_html(first, page.facts[first.name]), elem_id="headline")
        form = _build_form(page, domain, size)
        status = gr.HTML(page.opening_status(first), elem_id="status")
        view = page.opening(first)
        panels = _build_sides(gr, view)
        lost = gr.HTML(surprise_html(view.spans), elem_id="surprise")
        gr.HTML(render("meaning"))
        outputs = _Outputs(top, status, panels, lost, _build_tabs(page, first))
        writing = _connect_comparison(page, form, outputs)
        _connect_choices(page, form, outputs, writing)
        _add_api(gr, page.comparer, settings.limits)
        blocks.load(None, js=_NAME_GROUPS, api_visibility="private")
    return blocks


def _build_choice(page: PageModels) -> tuple[Any, Any]:
    """Return the controls that choose the model; those with a single choice are hidden."""
    gr, names = page.gr, list(page.domains)
    domain = gr.Radio(names, value=names[0], label="Domain", elem_id="domain", visible=len(names) > 1)
    return domain, gr.Slider(**_size_options(page, names[0]), step=1, label=_size_label(page, names[0]), elem_id="size")


def _size_options(page: PageModels, domain: str) -> dict[str, Any]:
    sizes = len(page.domains[domain])
    return {"minimum": 1, "maximum": max(2, sizes), "value": 1, "visible": sizes > 1}


def _size_label(page: PageModels, domain: str) -> str:
    return f"Size of the pruned model: 1 (largest) to {len(page.domains[domain])} (smallest)"


def _build_form(page: PageModels, domain: Any, size: Any) -> _Form:  # noqa: ANN401
    gr, first, limits = page.gr, page.settings.entries[0], page.settings.limits
    prompt = gr.Textbox(
        value=page.opening_prompt(first),
        label="Your text",
        placeholder=f"Up to {limits.prompt_characters:,} characters",
        lines=2,
        max_lines=10,
        elem_id="prompt",
    )
    examples = gr.Dataset(
        components=[prompt],
        samples=_samples(first),
        label="Examples",
        type="index",
        elem_id="examples",
        visible=bool(first.prompts),
    )
    with gr.Row():
        mode = gr.Radio(
            page.modes(first),
            value=CONTINUE,
            label="What the models do with it",
            show_label=False,
            container=False,
            elem_id="mode",
            min_width=260,
            scale=4,
        )
        run = gr.Button("Compare", variant="primary", elem_id="run", min_width=120, scale=2)
        stop = gr.Button("Stop", elem_id="stop", min_width=80, scale=1, interactive=False)
    new_chat = gr.Button("New chat", elem_id="new-chat", size="sm", visible=False)
    turns = gr.State((), time_to_live=_FORGET_SECONDS)
    with gr.Accordion("Options", open=False), gr.Row():
        length = gr.Slider(
            1,
            limits.new_tokens,
            value=_usual_tokens(limits),
            step=1,
            label="Tokens to write, at most",
            elem_id="length",
            min_width=240,
        )
        temperature = gr.Slider(
            0,
            MAX_TEMPERATURE,
            value=0,
            step=0.1,
            label="Temperature (0: always the likeliest token)",
            elem_id="temperature",
            min_width=240,
        )
    return _Form(domain, size, prompt, examples, mode, run, stop, length, temperature, turns, new_chat)


def _build_sides(gr: Any, view: View) -> list[Any]:  # noqa: ANN401
    """Return the figures and the text of both models, in turn; a phone shows one of them at a time."""
    panels = []
    with gr.Column(elem_id="comparison"):
        names = [(side.kind.capitalize(), side.kind) for side in view.sides]
        gr.Radio(
            names,
            value="pruned",
            label="Model to show",
            show_label=False,
            container=False,
            interactive=True,
            elem_id="which",
        )
        with gr.Row(elem_id="sides"):
            for side in view.sides:
                with gr.Column(min_width=300, elem_id=f"{side.kind}-side"):
                    stats = gr.HTML(side_html(side), elem_id=f"{side.kind}-stats")
                    # A text box shows text: the output of a model is never HTML or Markdown here.
                    text = gr.Textbox(
                        value=side_text(side),
                        label=f"Text of the {side.kind} model",
                        show_label=False,
                        container=False,
                        lines=7,
                        max_lines=18,
                        interactive=False,
                        buttons=["copy"],
                        elem_id=f"{side.kind}-text",
                        placeholder=f"The text of the {side.kind} model",
                    )
                    panels += [stats, text]
    return panels


def _build_tabs(page: PageModels, first: Entry) -> list[Any]:
    """Return the components that change with the model; a tab that has nothing to say is not there."""
    gr, facts = page.gr, page.facts[first.name]
    domains, questions = domain_table(page.facts), question_table(page.facts)
    with gr.Tabs():
        with gr.Tab("Removed", id="removed"):
            removed = gr.HTML(removed_html(facts), elem_id="removed")
        with gr.Tab("Widths", id="widths", visible=has_widths(facts)) as tab:
            widths = gr.HTML(widths_html(facts), elem_id="widths")
        with gr.Tab("Domains", id="matrix", visible=bool(domains[1])):
            gr.HTML(table_html(domains, DOMAINS_CAPTION), elem_id="matrix")
        with gr.Tab("Questions", id="questions", visible=bool(questions[1])):
            gr.HTML(table_html(questions, QUESTIONS_CAPTION), elem_id="questions")
    return [removed, tab, widths]


def _connect_comparison(page: PageModels, form: _Form, outputs: _Outputs) -> Any:  # noqa: ANN401
    """Let the buttons start and stop the writing; return the event that writes."""
    gr = page.gr

    def show(
        domain: Any,  # noqa: ANN401 - whatever a visitor sends
        size: Any,  # noqa: ANN401
        prompt: Any,  # noqa: ANN401
        mode: Any,  # noqa: ANN401
        length: Any,  # noqa: ANN401
        temperature: Any,  # noqa: ANN401
        turns: tuple[Turn, ...],
    ) -> Iterator[tuple[Any, ...]]:
        entry, keep = page.entry(domain, size), gr.update()
        request, turns = _make_request(prompt, mode, length, temperature, turns), turns if mode == CHAT else ()
        for view in page.comparer.compare(entry.name, request):
            question = prompt if mode == CHAT and not view.refused else ""
            shown = _show_view(view, turns, question)
            yield (*shown, gr.Button(interactive=True), keep)
        after = turns
        if question and not any(side.problem for side in view.sides):
            after = (*turns, Turn(question, *(side.progress.text.strip() for side in view.sides)))
        yield (*shown, gr.Button(interactive=False), after)

    writing = gr.on(
        [form.run.click, form.prompt.submit],
        show,
        form.request,
        [outputs.status, *outputs.panels, outputs.surprise, form.stop, form.turns],
        concurrency_id=_GENERATION,
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=[outputs.status],
    )
    writing.then(  # Gradio shows the last output of a generator twice, which would clear what was typed in between
        lambda turns, prompt: "" if turns and turns[-1].question == prompt else gr.update(),
        [form.turns, form.prompt],
        [form.prompt],
        **_QUIET,
    )
    form.stop.click(
        lambda: (render("status", text="Stopped.", bad=False), gr.Button(interactive=False)),
        None,
        [outputs.status, form.stop],
        cancels=[writing],
        **_QUIET,
    )
    return writing


def _show_view(view: View, turns: tuple[Turn, ...] = (), question: str = "") -> tuple[str, ...]:
    """Return the contents of the status, of both panels and of the coloured text."""
    panels = (part for side in view.sides for part in (side_html(side), side_text(side, turns, question)))
    return status_html(view), *panels, surprise_html(view.spans)


def _connect_choices(page: PageModels, form: _Form, outputs: _Outputs, writing: Any) -> None:  # noqa: ANN401
    """Let the domains, the sizes and the examples fill the page."""
    gr = page.gr

    def fill(entry: Entry) -> tuple[Any, ...]:
        view, facts = page.opening(entry), page.facts[entry.name]
        _, *contents = _show_view(view)
        samples = _samples(entry)
        return (
            headline_html(entry, facts),
            page.opening_prompt(entry),
            gr.Dataset(samples=samples, visible=bool(samples[0])),
            gr.Radio(page.modes(entry), value=CONTINUE),
            page.opening_status(entry),
            *contents,
            removed_html(facts),
            gr.Tab(visible=has_widths(facts)),
            widths_html(facts),
            (),
        )

    def choose(domain: Any) -> tuple[Any, ...]:  # noqa: ANN401
        entry = page.entry(domain, 1)
        sizes = gr.Slider(**_size_options(page, entry.domain), label=_size_label(page, entry.domain))
        return (sizes, *fill(entry))

    def fill_in(domain: Any, size: Any, index: int) -> tuple[str, str]:  # noqa: ANN401
        text = page.entry(domain, size).prompts[index]
        return text, CHAT if text.rstrip().endswith("?") and CHAT in page.modes(page.entry(domain, size)) else CONTINUE

    filled = [
        *(outputs.headline, form.prompt, form.examples, form.mode),
        *(outputs.status, *outputs.panels, outputs.surprise, *outputs.tabs, form.turns),
    ]
    form.domain.change(choose, [form.domain], [form.size, *filled], cancels=[writing], **_QUIET)
    form.size.input(
        lambda domain, size: fill(page.entry(domain, size)),
        [form.domain, form.size],
        filled,
        cancels=[writing],
        **_QUIET,
    )
    gr.on(
        [form.mode.change, form.new_chat.click],
        lambda mode: (gr.Button(visible=mode == CHAT), ()),
        [form.mode],
        [form.new_chat, form.turns],
        **_QUIET,
    )
    form.new_chat.click(lambda: ("", ""), None, outputs.panels[1::2], cancels=[writing], **_QUIET)
    form.examples.click(fill_in, [form.domain, form.size, form.examples], [form.prompt, form.mode], **_QUIET)


def _add_api(gr: Any, comparer: Comparer, limits: Limits) -> None:  # noqa: ANN401
    """Offer the comparison to programs, as ``/compare``."""
    usual_tokens = _usual_tokens(limits)

    def compare(
        domain: str, prompt: str, mode: str = CONTINUE, new_tokens: int = usual_tokens, temperature: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        for view in comparer.compare(domain, _make_request(prompt, mode, new_tokens, temperature)):
            if view.refused:
                raise gr.Error(view.status, print_exception=False)
            sides = {side.kind: side_values(side) for side in view.sides}
            yield {"status": view.status, **sides, "pieces": span_values(view.spans)}

    gr.api(compare, api_name="compare", concurrency_id=_GENERATION)


def _usual_tokens(limits: Limits) -> int:
    return min(_USUAL_TOKENS, limits.new_tokens)


def _make_request(
    prompt: Any,  # noqa: ANN401 - checked later, as the others
    mode: Any,  # noqa: ANN401
    length: Any,  # noqa: ANN401
    temperature: Any,  # noqa: ANN401
    turns: tuple[Turn, ...] = (),
) -> Request:
    whole = isinstance(length, float) and length.is_integer()
    return Request(prompt, mode, int(length) if whole else length, temperature, turns)


def _samples(entry: Entry) -> list[list[str]]:
    return [[prompt] for prompt in entry.prompts] or [[]]
