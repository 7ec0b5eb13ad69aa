"""`evaluate()`: one model, or a model against its base, on text and on multiple-choice questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_context_prune.data.documents import TextSource, load_documents
from hf_context_prune.evaluation.general_text import build_loss_facts, read_general
from hf_context_prune.evaluation.harness import write_harness_task
from hf_context_prune.evaluation.options import EvalOptions, QuestionOptions
from hf_context_prune.evaluation.reports.report import (
    Environment,
    EvalReport,
    MemoryFacts,
    SizeFacts,
    TextLosses,
)
from hf_context_prune.evaluation.scores import answer_with_models
from hf_context_prune.evaluation.speed import measure_peak_memory
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.storage.gguf import explain_gguf_sizes
from hf_context_prune.storage.loading import LoadedModel, ensure_loaded
from hf_context_prune.storage.saving import count_weight_bytes

from .comparison import MeasuredText, speed_facts


def evaluate(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    *,
    base: PreTrainedModel | LoadedModel | str | Path | None = None,
    tokenizer: Any = None,  # noqa: ANN401
    text_column: str | None = None,
    max_seq_length: int = 512,
    seed: int = 0,
    eval_options: EvalOptions | None = None,
    questions: QuestionOptions | None = None,
) -> EvalReport:
    """Measure a model on text: bits per byte and perplexity, size and speed; and its answers to questions.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        data: What [`load_documents`][] reads. Only the caller knows whether the model was calibrated on it.
        base: The model that it was pruned from: both are measured on the same documents and questions.
        tokenizer: Tokenizer of `model`, as for [`prune`][].
        text_column: Column with the text.
        max_seq_length: Tokens per window.
        seed: Seed of the bootstrap and of the choice of documents.
        eval_options: How much is measured.
        questions: Multiple-choice questions, if any.

    Returns:
        The figures of base and pruned model; without a `base` those of the model, under that name. `report.loss` has
        losses with intervals over documents, `report.size` parameters and bytes, `report.speed` and `report.memory`
        what was timed, and `report.to_dict()` everything.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.

    Example:
        ```python
        from hf_context_prune import evaluate

        report = evaluate("mini-gpt", "more-contracts.jsonl", base="demo")
        print(report.loss.base.bits_per_byte.value, report.loss.pruned.bits_per_byte.value)
        ```
    """
    options = eval_options or EvalOptions()
    own = ensure_loaded(model, tokenizer)
    first = own if base is None else ensure_loaded(base)
    asked = None
    if questions is not None:  # read before anything long
        asked = questions.load()
    text = load_documents(data, text_column=text_column, tokenizer=first.tokenizer, seed=seed)
    general = read_general(options.general_data, apart_from=None, test=text, tokenizer=first.tokenizer, seed=seed)
    how_long: dict[str, Any] = {"max_seq_length": max_seq_length, "max_tokens": options.max_tokens, "seed": seed}
    dense, pair = (first.model, first.tokenizer), None if base is None else (own.model, own.tokenizer)

    def measure(source: TextSource, how: str, what: str) -> TextLosses:
        found = MeasuredText.measure(source, how, first, **how_long)
        others = {} if pair is None else found.losses({"pruned": pair}, max_seq_length)
        return TextLosses(found.facts, build_loss_facts(found.base, others, seed=seed, what=what))

    if questions is not None and asked is not None and questions.harness_task is not None:
        write_harness_task(asked, questions.harness_task, num_fewshot=questions.num_fewshot)
    domain = measure(text, "The given text, unchanged.", "text")
    general_facts = None if general is None else measure(general.source, general.how, "general text")
    choice = None
    if questions is not None and asked is not None:
        choice = answer_with_models(asked, questions, dense, pair)
    speed, notes = speed_facts(first.model, None if base is None else own.model) if options.benchmark else (None, ())
    return EvalReport(
        base_model=first.name,
        dataset=domain.dataset,
        size=SizeFacts.measured(
            first.model.num_parameters(),
            None if base is None else own.model.num_parameters(),
            base_weight_bytes=count_weight_bytes(first.folder) if first.folder else None,
            pruned_weight_bytes=count_weight_bytes(own.folder) if base is not None and own.folder else None,
        ),
        loss=domain.loss,
        environment=Environment.current(dtype_name(own.model)),
        speed=speed,
        memory=_memory(first, None if base is None else own) if options.memory else None,
        multiple_choice=choice,
        general=general_facts,
        notes=(*explain_gguf_sizes(*((own,) if base is None else (first, own))), *notes),
    )


def _memory(base: LoadedModel, pruned: LoadedModel | None) -> MemoryFacts | None:
    peaks = [
        None if model is None or not model.folder else measure_peak_memory(model.folder) for model in (base, pruned)
    ]
    return MemoryFacts(*peaks) if any(peaks) else None
