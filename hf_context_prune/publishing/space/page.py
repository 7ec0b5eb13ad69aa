"""The page of a Space: Gradio 6 blocks around `Comparer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .compare import Comparer, View
from .facts import Facts, domain_table, question_table, read_facts
from .generation import ANSWER, CONTINUE, MAX_TEMPERATURE, Request
from .gradio_import import import_gradio
from .html import render
from .settings import Entry, Limits, Settings
from .store import ModelStore
from .views import removed_html, side_html, side_text, side_values, status_html, table_html, width_chart

DOMAINS_CAPTION = (
    "Change of the bits per byte against the dense model on test text, with the 95 % interval over documents. Zero is "
    "as good as the dense model, below zero is better. Text outside a model's domain usually suffers more."
)
QUESTIONS_CAPTION = (
    "Share of multiple-choice questions answered correctly, with the 95 % interval. Near the share of guessing, a "
    "difference has no meaning."
)
NO_REPORTS = "No model here has an evaluation report."
NO_QUESTIONS = "No report has multiple-choice questions: `hf-context-prune evaluate --base --questions` asks them."
_LOGGER = logging.getLogger(__name__)
_GENERATION = "generation"  # one queue for the page and the API
_FORGET_SECONDS = 3_600
_USUAL_TOKENS = 96


@dataclass(frozen=True)
class _Form:
    """The inputs of the page, as Gradio components."""

    domain: Any
    prompt: Any
    examples: Any
    mode: Any
    run: Any
    stop: Any
    length: Any
    temperature: Any

    @property
    def request(self) -> list[Any]:
        """Return the inputs of a comparison, in the order of the handlers."""
        return [self.domain, self.prompt, self.mode, self.length, self.temperature]


def build(settings: Settings, store: ModelStore | None = None) -> Any:  # noqa: ANN401 - gradio.Blocks
    """Build the blocks of a Space, to be served by [`serve`][].

    Args:
        settings: The settings of the Space.
        store: Its models; by default a new store, with nothing loaded.

    Raises:
        ConfigError: Gradio is not installed.
    """
    gr = import_gradio()
    comparer = Comparer(settings, store or ModelStore())
    facts = {entry.name: read_facts(entry) for entry in settings.entries}
    for name, fact in facts.items():
        for problem in fact.problems:
            _LOGGER.warning("%s: %s", name, problem)
    first = settings.entries[0]
    with gr.Blocks(
        title=settings.title, analytics_enabled=False, delete_cache=(_FORGET_SECONDS, _FORGET_SECONDS)
    ) as blocks:
        gr.HTML(render("head", title=settings.title))
        form = _build_form(gr, settings)
        idle = comparer.idle(first.name)
        status = gr.HTML(status_html(idle), elem_id="status")
        panels = _build_sides(gr, idle)
        gr.HTML(render("meaning"))
        tabs = _build_tabs(gr, facts, first.name)
        writing = _connect_comparison(gr, comparer, form, [status, *panels])
        _connect_choices(gr, comparer, facts, form, [status, *panels, *tabs], writing)
        _add_api(gr, comparer, settings.limits)
    return blocks


def _build_form(gr: Any, settings: Settings) -> _Form:  # noqa: ANN401
    first, limits = settings.entries[0], settings.limits
    domain = gr.Radio([entry.name for entry in settings.entries], value=first.name, label="Domain", elem_id="domain")
    prompt = gr.Textbox(
        label="Your text",
        placeholder=f"Up to {limits.prompt_characters:,} characters",
        lines=3,
        max_lines=10,
        elem_id="prompt",
    )
    examples = gr.Dataset(
        components=[prompt], samples=_samples(first), label="Examples", type="index", elem_id="examples"
    )
    with gr.Row(equal_height=True):
        mode = gr.Radio(
            [CONTINUE, ANSWER], value=CONTINUE, show_label=False, container=False, elem_id="mode", min_width=260
        )
        run = gr.Button("Compare", variant="primary", elem_id="run", min_width=120)
        stop = gr.Button("Stop", elem_id="stop", min_width=120)
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
    return _Form(domain, prompt, examples, mode, run, stop, length, temperature)


def _build_sides(gr: Any, idle: View) -> list[Any]:  # noqa: ANN401
    """Return the figures and the text of both models, in turn."""
    panels = []
    with gr.Row(elem_id="sides"):
        for side in idle.sides:
            with gr.Column(min_width=300):
                stats = gr.HTML(side_html(side), elem_id=f"{side.kind}-stats")
                # A text box shows text: the output of a model is never HTML or Markdown here.
                text = gr.Textbox(
                    show_label=False,
                    container=False,
                    lines=9,
                    max_lines=18,
                    interactive=False,
                    buttons=["copy"],
                    elem_id=f"{side.kind}-text",
                    placeholder=f"The text of the {side.kind} model",
                )
                panels += [stats, text]
    return panels


def _build_tabs(gr: Any, facts: dict[str, Facts], first: str) -> list[Any]:  # noqa: ANN401
    """Return the components that change with the domain: removed parts, neurons, KV groups."""
    with gr.Tabs():
        with gr.Tab("Removed", id="removed"):
            removed = gr.HTML(removed_html(facts[first]), elem_id="removed")
        with gr.Tab("Widths", id="widths"):
            neurons = width_chart(gr, facts[first], "neurons")
            groups = width_chart(gr, facts[first], "kv_groups")
        with gr.Tab("Domains", id="matrix"):
            gr.HTML(table_html(domain_table(facts), DOMAINS_CAPTION, NO_REPORTS), elem_id="matrix")
        with gr.Tab("Questions", id="questions"):
            gr.HTML(table_html(question_table(facts), QUESTIONS_CAPTION, NO_QUESTIONS), elem_id="questions")
    return [removed, neurons, groups]


def _connect_comparison(gr: Any, comparer: Comparer, form: _Form, outputs: list[Any]) -> Any:  # noqa: ANN401
    """Let the buttons start and stop the writing; return the event that writes."""

    def show(
        domain: str, prompt: str, mode: str, length: float, temperature: float
    ) -> Iterator[tuple[str, str, str, str, str]]:
        for view in comparer.compare(domain, _make_request(prompt, mode, length, temperature)):
            dense, pruned = view.sides
            yield status_html(view), side_html(dense), side_text(dense), side_html(pruned), side_text(pruned)

    writing = gr.on(
        [form.run.click, form.prompt.submit],
        show,
        form.request,
        outputs,
        concurrency_id=_GENERATION,
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=outputs[:1],
    )
    form.stop.click(
        lambda: render("status", text="Stopped.", bad=False),
        None,
        outputs[:1],
        cancels=[writing],
        api_visibility="private",
        queue=False,
        show_progress="hidden",
    )
    return writing


def _connect_choices(
    gr: Any,  # noqa: ANN401
    comparer: Comparer,
    facts: dict[str, Facts],
    form: _Form,
    outputs: list[Any],
    writing: Any,  # noqa: ANN401
) -> None:
    """Let the domains and the examples fill the page."""

    def choose(domain: str) -> tuple[Any, ...]:
        entry = comparer.entry(domain)
        view, fact = comparer.idle(domain), facts[domain]
        samples = _samples(entry)
        return (
            gr.Dataset(samples=samples, visible=bool(samples[0])),
            status_html(view),
            *(part for side in view.sides for part in (side_html(side), "")),
            removed_html(fact),
            width_chart(gr, fact, "neurons"),
            width_chart(gr, fact, "kv_groups"),
        )

    def fill_in(domain: str, index: int) -> tuple[str, str]:
        text = comparer.entry(domain).prompts[index]
        return text, ANSWER if text.rstrip().endswith("?") else CONTINUE

    form.domain.change(
        choose,
        [form.domain],
        [form.examples, *outputs],
        api_visibility="private",
        queue=False,
        show_progress="hidden",
        cancels=[writing],
    )
    form.examples.click(
        fill_in,
        [form.domain, form.examples],
        [form.prompt, form.mode],
        api_visibility="private",
        queue=False,
        show_progress="hidden",
    )


def _add_api(gr: Any, comparer: Comparer, limits: Limits) -> None:  # noqa: ANN401
    """Offer the comparison to programs, as ``/compare``."""
    usual_tokens = _usual_tokens(limits)

    def compare(
        domain: str, prompt: str, mode: str = CONTINUE, new_tokens: int = usual_tokens, temperature: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        for view in comparer.compare(domain, _make_request(prompt, mode, new_tokens, temperature)):
            if view.refused:
                raise gr.Error(view.status, print_exception=False)
            yield {"status": view.status, **{side.kind: side_values(side) for side in view.sides}}

    gr.api(compare, api_name="compare", concurrency_id=_GENERATION)


def _usual_tokens(limits: Limits) -> int:
    return min(_USUAL_TOKENS, limits.new_tokens)


def _make_request(prompt: Any, mode: Any, length: Any, temperature: Any) -> Request:  # noqa: ANN401 - checked later
    whole = isinstance(length, float) and length.is_integer()
    return Request(prompt, mode, int(length) if whole else length, temperature)


def _samples(entry: Entry) -> list[list[str]]:
    return [[prompt] for prompt in entry.prompts] or [[]]
