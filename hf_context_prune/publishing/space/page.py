"""The page: Gradio 6 blocks around `Comparer`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_context_prune.errors import ConfigError, ContextPruneError

from .compare import Comparer, Side, View
from .facts import Facts, describe_removal, domain_table, question_table, read_facts, report_rows
from .generation import ANSWER, CONTINUE, MAX_TEMPERATURE, Request
from .gradio_import import gradio
from .html import render, text_file
from .settings import Entry, Settings
from .store import ModelStore

MATRIX_CAPTION = (
    "Change of the bits per byte against the dense model on held-out text, with the 95 % interval over documents. Zero "
    "is as good as the dense model, below it is better, and text that is not the model's domain usually suffers more."
)
QUESTIONS_CAPTION = (
    "Share of multiple-choice questions answered rightly, with the 95 % interval. Near the share of guessing, a "
    "difference says nothing."
)
_LOGGER = logging.getLogger(__name__)
_HEAD = "<style>@media (max-width: 640px) { .gradio-container > .main { padding: 0.75rem !important; } }</style>"
"""What `css` can't reach: Gradio confines it to what lies within."""
_GENERATION = "generation"  # one queue for the page and the API
_UPLOAD_BYTES = 1  # nothing here takes a file
_FORGET_SECONDS = 3_600


def build(settings: Settings, store: ModelStore | None = None) -> Any:  # noqa: ANN401 - gradio.Blocks
    """The blocks of a Space, to be served by `serve`.

    Args:
        settings: What it shows.
        store: Its models; by default a new one, with nothing loaded.

    Raises:
        ConfigError: Gradio is not installed.
    """
    gr = gradio()
    comparer = Comparer(settings, store or ModelStore())
    facts = {entry.name: read_facts(entry) for entry in settings.entries}
    for name, fact in facts.items():
        for problem in fact.problems:
            _LOGGER.warning("%s: %s", name, problem)
    first, limits = settings.entries[0], settings.limits
    usual_tokens = min(96, limits.new_tokens)
    with gr.Blocks(
        title=settings.title, analytics_enabled=False, delete_cache=(_FORGET_SECONDS, _FORGET_SECONDS)
    ) as blocks:
        gr.HTML(render("head", title=settings.title))
        domain = gr.Radio(
            [entry.name for entry in settings.entries], value=first.name, label="Domain", elem_id="domain"
        )
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
                value=usual_tokens,
                step=1,
                label="Tokens at most",
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
        idle = comparer.idle(first.name)
        status = gr.HTML(_status(idle), elem_id="status")
        panels = []
        with gr.Row(elem_id="sides"):
            for side in idle.sides:
                with gr.Column(min_width=300):
                    stats = gr.HTML(_stats(side), elem_id=f"{side.kind}-stats")
                    # A text box shows text: what a model writes is never HTML or Markdown here.
                    text = gr.Textbox(
                        show_label=False,
                        container=False,
                        lines=9,
                        max_lines=18,
                        interactive=False,
                        buttons=["copy"],
                        elem_id=f"{side.kind}-text",
                        placeholder=f"What the {side.kind} model writes",
                    )
                    panels += [stats, text]
        gr.HTML(render("meaning"))
        with gr.Tabs():
            with gr.Tab("Removed", id="removed"):
                removed = gr.HTML(_removed(facts[first.name]), elem_id="removed")
            with gr.Tab("Widths", id="widths"):
                neurons = _bars(gr, facts[first.name], "neurons")
                groups = _bars(gr, facts[first.name], "kv_groups")
            with gr.Tab("Domains", id="matrix"):
                gr.HTML(
                    _table(domain_table(facts), MATRIX_CAPTION, "No model here has an evaluation report."),
                    elem_id="matrix",
                )
            with gr.Tab("Questions", id="questions"):
                empty = "No report has multiple-choice questions: `hf-context-prune evaluate --base --questions` asks."
                gr.HTML(_table(question_table(facts), QUESTIONS_CAPTION, empty), elem_id="questions")

        def show(
            domain: str, prompt: str, mode: str, length: float, temperature: float
        ) -> Iterator[tuple[str, str, str, str, str]]:
            for view in comparer.compare(domain, _make_request(prompt, mode, length, temperature)):
                dense, pruned = view.sides
                yield _status(view), _stats(dense), _text(dense), _stats(pruned), _text(pruned)

        def choose(domain: str) -> tuple[Any, ...]:
            entry = comparer.entry(domain)
            view, fact = comparer.idle(domain), facts[domain]
            samples = _samples(entry)
            return (
                gr.Dataset(samples=samples, visible=bool(samples[0])),
                _status(view),
                *(part for side in view.sides for part in (_stats(side), "")),
                _removed(fact),
                _bars(gr, fact, "neurons"),
                _bars(gr, fact, "kv_groups"),
            )

        def example(domain: str, index: int) -> tuple[str, str]:
            text = comparer.entry(domain).prompts[index]
            return text, ANSWER if text.rstrip().endswith("?") else CONTINUE

        def program(
            domain: str, prompt: str, mode: str = CONTINUE, new_tokens: int = usual_tokens, temperature: float = 0.0
        ) -> Iterator[dict[str, Any]]:
            for view in comparer.compare(domain, _make_request(prompt, mode, new_tokens, temperature)):
                if view.refused:
                    raise gr.Error(view.status, print_exception=False)
                yield {"status": view.status, **{side.kind: _plain(side) for side in view.sides}}

        writing = gr.on(
            [run.click, prompt.submit],
            show,
            [domain, prompt, mode, length, temperature],
            [status, *panels],
            concurrency_id=_GENERATION,
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=[status],
        )
        stop.click(
            lambda: render("status", text="Stopped.", bad=False),
            None,
            [status],
            cancels=[writing],
            api_visibility="private",
            queue=False,
            show_progress="hidden",
        )
        domain.change(
            choose,
            [domain],
            [examples, status, *panels, removed, neurons, groups],
            api_visibility="private",
            queue=False,
            show_progress="hidden",
            cancels=[writing],
        )
        examples.click(
            example, [domain, examples], [prompt, mode], api_visibility="private", queue=False, show_progress="hidden"
        )
        gr.api(program, api_name="compare", concurrency_id=_GENERATION)
    return blocks


def serve(blocks: Any, settings: Settings, **launch: Any) -> Any:  # noqa: ANN401 - what gradio's launch takes and gives
    """Serve the blocks of `build` to the public: one generation at a time, a short queue, no uploads, no insides.

    Args:
        blocks: Of `build`.
        settings: The same.
        launch: More of gradio's `launch`, such as ``prevent_thread_lock``. Address and port come from
            GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
    """
    gr = gradio()
    system = [gr.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")]
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=system, font_mono=mono).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color_dark="white",
    )  # with the system's fonts: none is fetched
    # api_open: outside of the Hub's Spaces, Gradio would let a plain POST skip the queue.
    blocks.queue(max_size=settings.limits.waiting, default_concurrency_limit=1, api_open=False)
    return blocks.launch(
        theme=theme,
        css=text_file("style.css"),
        head=_HEAD,
        show_error=False,
        max_file_size=_UPLOAD_BYTES,
        enable_monitoring=False,
        ssr_mode=False,
        footer_links=["api", "gradio"],
        **launch,
    )


def _make_request(prompt: Any, mode: Any, length: Any, temperature: Any) -> Request:  # noqa: ANN401 - checked by `compare`
    whole = isinstance(length, float) and length.is_integer()
    return Request(prompt, mode, int(length) if whole else length, temperature)


def _samples(entry: Entry) -> list[list[str]]:
    return [[prompt] for prompt in entry.prompts] or [[]]


def _status(view: View) -> str:
    return render("status", text=view.status, bad=view.refused)


def _stats(side: Side) -> str:
    progress = side.progress
    speed, first = progress.tokens_per_second, progress.first_seconds
    return render(
        "side",
        kind=side.kind,
        name=side.name,
        speed="–" if speed is None else f"{speed:.1f}",
        first="–" if first is None else f"{first:.2f} s",
        megabytes="–" if side.megabytes is None else f"{side.megabytes:,.0f} MB",
        tokens=f"{progress.tokens:,}" if progress.tokens else "–",
    )


def _text(side: Side) -> str:
    return f"This model can't write: {side.problem}" if side.problem else side.progress.text.lstrip()


def _plain(side: Side) -> dict[str, Any]:
    progress = side.progress
    return {
        "model": side.name,
        "text": progress.text,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens_per_second,
        "first_token_seconds": progress.first_seconds,
        "megabytes": side.megabytes,
        "stopped": progress.stopped,
        "problem": side.problem,
    }


def _removed(facts: Facts) -> str:
    return render(
        "removed",
        problems=facts.problems,
        sentences=describe_removal(facts),
        rows=report_rows(facts.report),
        notes=facts.report.notes if facts.report else (),
    )


def _table(content: tuple[list[str], list[list[str]]], caption: str, empty: str) -> str:
    header, rows = content
    return render("table", header=header, rows=rows, caption=caption, empty=empty)


def _frame(facts: Facts, unit: str) -> Any:  # noqa: ANN401 - a DataFrame; pandas comes with gradio
    import pandas as pd

    rows = []
    if facts.plan is not None:
        for layer, (dense, kept) in enumerate(zip(facts.plan.dense, facts.plan.widths, strict=True)):
            before, left = getattr(dense, unit), getattr(kept, unit)
            rows += [(layer, before - left, "gone"), (layer, left, "kept")]  # stacked from the last one up
        rows.append((len(facts.plan.dense), 0, "kept"))  # the last bin is closed: without this it holds two layers
    return pd.DataFrame(rows, columns=["layer", unit, "what"])


def _bars(gr: Any, facts: Facts, unit: str) -> Any:  # noqa: ANN401 - gradio.BarPlot
    return gr.BarPlot(
        _frame(facts, unit),
        x="layer",
        y=unit,
        color="what",
        color_map={"kept": "#0d9488", "gone": "#cbd5e1"},
        title={"neurons": "MLP neurons, layer by layer", "kv_groups": "KV groups (attention), layer by layer"}[unit],
        x_title="layer",
        y_title="neurons" if unit == "neurons" else "groups",
        color_title=" ",
        height=260 if unit == "neurons" else 200,
        x_bin=1,
        x_axis_format="d",
        y_aggregate="sum",
        colors_in_legend=["kept", "gone"],
        elem_id=f"widths-{unit}",
        buttons=["fullscreen"],
    )


def picked(arguments: list[str], beside: Path) -> Settings:
    """The settings that a start of ``app.py`` means.

    Args:
        arguments: At most one: the YAML of a Space.
        beside: Of ``app.py``: its ``space.yaml`` is taken with no argument, if there is one; without both, the
            embedded default: the folder that ``hf-context-prune demo`` wrote to the current folder.

    Raises:
        ConfigError: More than one argument, or a YAML that can't be used.
    """
    from .settings import DEMO_FOLDER, demo_settings, read_space_settings

    if len(arguments) > 1:
        raise ConfigError(f"app.py takes one argument, the YAML of a Space; it was given {len(arguments)}.")
    own = beside / "space.yaml"
    if arguments or own.is_file():
        return read_space_settings(arguments[0] if arguments else own)
    return demo_settings(Path(DEMO_FOLDER).absolute())


def main(beside: Path) -> None:
    """Serve a Space until it is stopped.

    Args:
        beside: Folder of the ``app.py`` that is run.
    """
    try:
        settings = picked(sys.argv[1:], beside)
        blocks = build(settings)
    except ContextPruneError as error:
        sys.exit(f"Error: {error}")
    serve(blocks, settings)
