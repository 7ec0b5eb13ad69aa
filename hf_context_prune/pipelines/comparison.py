"""Base, pruned and recovered model on the same passages of text, and the report that their figures make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.evaluation.general_text import (
    GeneralText,
    ModelAndTokenizer,
    build_loss_facts,
    dataset_facts,
)
from hf_context_prune.evaluation.losses import DocumentLoss, mean_bits_per_byte, relative_change
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.passages import Passages
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossFacts,
    SizeFacts,
    SizeSearch,
    SpeedFacts,
    TextLosses,
)
from hf_context_prune.evaluation.speed import measure_speed
from hf_context_prune.modeling.in_turns import fits_with_weights
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.distributed import on_main_process

_MUCH_MORE = 0.01
"""Share of all parameters above the budget that is no rounding."""
_NO_SPEED = "No speed was measured: a model that does not fit into memory is read again for each token."
_SAME_LOSS = 2e-3  # relative: of one model on one text in two runs (another dtype, another number of threads)


@dataclass(frozen=True)
class MeasuredText:
    """A text that models are compared on.

    Attributes:
        passages: The passages of it that are measured on.
        facts: Its facts, for the report.
        base: Losses of the base model; None where there is no base to measure.
        known: Losses on the same passages that an earlier report of the pruned model states; None where none does.
    """

    passages: Passages
    facts: DatasetFacts
    base: list[DocumentLoss] | None = None
    known: LossFacts | None = None

    @classmethod
    def measure(
        cls,
        source: TextSource,
        how: str,
        base: LoadedModel,
        *,
        max_seq_length: int,
        max_tokens: int | None,
        earlier: TextLosses | None = None,
        seed: int = 0,
    ) -> MeasuredText:
        """Choose passages, and measure the base model on them.

        Args:
            source: The text.
            how: Sentences on how it was kept apart from other text.
            base: The base model, whose tokenizer counts the tokens.
            max_seq_length: Tokens per window.
            max_tokens: Largest number of tokens; None takes the whole text.
            earlier: Losses of an earlier report of the pruned model.
            seed: Chooses the passages.
        """
        passages = Passages.of(source, base.tokenizer, max_tokens=max_tokens, seed=seed)
        same = earlier is not None and earlier.dataset.fingerprint == passages.text.fingerprint
        facts = dataset_facts(passages, how, max_seq_length)
        found = cls(passages, facts, known=earlier.loss if earlier and same else None)
        losses = found.losses({"base": (base.model, base.tokenizer)}, max_seq_length)
        return replace(found, base=losses["base"])

    @classmethod
    def without_base(
        cls,
        source: TextSource,
        how: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int,
        max_tokens: int | None,
        earlier: TextLosses | None,
    ) -> MeasuredText:
        """Choose the passages of an earlier report if the text is the same, so that its figures can be taken over.

        Args:
            source: The text.
            how: Sentences on how it was kept apart from other text.
            tokenizer: Counts the tokens where the report doesn't serve.
            max_seq_length: Tokens per window.
            max_tokens: Largest number of tokens of the base; None takes the whole text.
            earlier: Losses of an earlier report.
        """
        if earlier is not None and (base := earlier.loss.base) is not None:
            limit = earlier.dataset.max_chars
            fits = limit is None if max_tokens is None else base.num_tokens <= max_tokens
            if fits:
                passages = Passages.whole(source) if limit is None else Passages.within(source, limit)
                same = passages.text.fingerprint == earlier.dataset.fingerprint
                if same and passages.text.num_bytes == base.num_bytes:
                    return cls(passages, dataset_facts(passages, how, max_seq_length), known=earlier.loss)
        passages = Passages.of(source, tokenizer, max_tokens=max_tokens)
        return cls(passages, dataset_facts(passages, how, max_seq_length))

    def losses(self, models: Mapping[str, ModelAndTokenizer], max_seq_length: int) -> dict[str, list[DocumentLoss]]:
        """Measure models, by what the progress bar calls them."""
        return {
            name: document_losses(
                *pair,
                self.passages.text,
                max_seq_length=max_seq_length,
                description=f"Measuring {name} on {self.facts.name}",
            )
            for name, pair in models.items()
        }

    def loss_facts(
        self, measured: Mapping[str, list[DocumentLoss]], *, trained_again: bool, seed: int, what: str
    ) -> LossFacts:
        """Return the facts of the losses, those of an earlier report included.

        Args:
            measured: Losses of the ``"pruned"`` and the ``"recovered"`` model, as far as they exist.
            trained_again: Whether the pruned model had been recovered before: then it is not the pruned model of the
                report, which an earlier report may know.
            seed: Seed of the intervals.
            what: What the log calls the text.
        """
        known = self.known
        if known is not None:
            stated, found = known.last.bits_per_byte.value, mean_bits_per_byte(measured["pruned"])
            if abs(found / stated - 1) > _SAME_LOSS:  # measured in another way, so the other figures were too
                known = None
        base = self.base if self.base is not None or known is None else known.base
        facts = build_loss_facts(base, measured, seed=seed, what=what)
        if trained_again:
            pruned, comparison = (None, None) if known is None else (known.pruned, known.comparison)
            facts = replace(facts, pruned=pruned, comparison=comparison)
        return facts


@dataclass(frozen=True)
class Comparison:
    """The texts that models are compared on.

    Attributes:
        base_name: Name of the base model.
        base: The base model; None where it is not at hand.
        domain: The domain's test text.
        general: Text of no domain that is measured on too, if there is one.
        options: How much is measured.
        max_seq_length: Tokens per window.
        seed: Seed of the intervals.
    """

    base_name: str
    base: LoadedModel | None
    domain: MeasuredText
    general: MeasuredText | None
    options: EvalOptions
    max_seq_length: int
    seed: int

    @classmethod
    def begin(
        cls,
        base: LoadedModel,
        split: TextSplit,
        general: GeneralText | None,
        options: EvalOptions,
        *,
        earlier: EvalReport | None = None,
        max_seq_length: int,
        seed: int,
    ) -> Comparison:
        """Measure the base on the texts, before the long work; an earlier report may know the pruned model's losses."""
        choose = partial(MeasuredText.measure, base=base, max_seq_length=max_seq_length, max_tokens=options.max_tokens)
        return cls(base.name, base, *_on_texts(choose, split, general, earlier), options, max_seq_length, seed)

    @classmethod
    def begin_without_base(
        cls,
        base_name: str,
        tokenizer: PreTrainedTokenizerBase,
        split: TextSplit,
        general: GeneralText | None,
        options: EvalOptions,
        *,
        earlier: EvalReport | None,
        max_seq_length: int,
        seed: int,
    ) -> Comparison:
        """Choose the texts where the base is not at hand; an earlier report may know its losses."""
        choose = partial(
            MeasuredText.without_base,
            tokenizer=tokenizer,
            max_seq_length=max_seq_length,
            max_tokens=options.max_tokens,
        )
        return cls(base_name, None, *_on_texts(choose, split, general, earlier), options, max_seq_length, seed)

    def report(
        self,
        size: SizeFacts,
        *,
        pruned: ModelAndTokenizer,
        recovered: ModelAndTokenizer | None = None,
        trained_again: bool = False,
        notes: tuple[str, ...],
        search: SizeSearch | None = None,
        predicted_excess: float | None = None,
    ) -> EvalReport:
        """Measure the other models, and put everything into a report; speed is that of the last model.

        Args:
            size: Sizes of the base and the last model.
            pruned: The pruned model.
            recovered: The pruned model after recovery, if there was one.
            trained_again: Whether `pruned` had been recovered before.
            notes: Sentences that a reader of the figures must know.
            search: How the size was found, if by search.
            predicted_excess: See `LossFacts`.
        """
        models = {"pruned": pruned} if recovered is None else {"pruned": pruned, "recovered": recovered}
        last, _ = recovered or pruned
        facts = list[TextLosses]()
        texts = {"text": self.domain, **({} if self.general is None else {"general text": self.general})}
        for what, text in texts.items():
            measured = text.losses(models, self.max_seq_length)
            found = text.loss_facts(measured, trained_again=trained_again, seed=self.seed, what=what)
            facts.append(TextLosses(text.facts, found))
            if recovered is not None and (found.base is None or trained_again):
                gain = format_change(relative_change(measured["pruned"], measured["recovered"], self.seed))
                notes = (*notes, f"This training changed the bits per byte on {text.facts.name} by {gain}.")
        speed, more = self._measure_speed(last)
        return EvalReport(
            base_model=self.base_name,
            dataset=facts[0].dataset,
            size=size,
            loss=replace(facts[0].loss, predicted_excess=predicted_excess),
            environment=Environment.current(dtype_name(last)),
            speed=speed,
            budget=search,
            general=facts[1] if len(facts) > 1 else None,
            notes=(*notes, *_more_than_asked(size), *more),
        )

    def _measure_speed(self, last: PreTrainedModel) -> tuple[SpeedFacts | None, tuple[str, ...]]:
        """Measure the last model beside the base, where it was asked for."""
        if not self.options.benchmark or self.base is None:
            return None, ()
        return speed_facts(self.base.model, last)


def _more_than_asked(size: SizeFacts) -> tuple[str, ...]:
    """Return why much more was removed than the budget asks for; () where it was not."""
    if size.asked_ratio is None or size.achieved_ratio is None or size.achieved_ratio <= size.asked_ratio + _MUCH_MORE:
        return ()
    return (
        f"More was removed than the asked {size.asked_ratio:.1%}: a number or a share of tokens, layers, experts or "
        f"other units that was given beside the budget takes more than that, or one step of what may be removed does.",
    )


def speed_facts(base: PreTrainedModel, pruned: PreTrainedModel | None) -> tuple[SpeedFacts | None, tuple[str, ...]]:
    """Measure models in one call, each that fits into memory with its weights; otherwise return why not."""
    models = {"base": base} if pruned is None else {"base": base, "pruned": pruned}
    if not all(map(fits_with_weights, models.values())):
        return None, (_NO_SPEED,)
    # In one process: several would slow each other down.
    speed = on_main_process(lambda: measure_speed(models))
    return SpeedFacts(speed["base"], speed.get("pruned")), ()


def _on_texts(
    choose: Callable[..., MeasuredText], split: TextSplit, general: GeneralText | None, earlier: EvalReport | None
) -> tuple[MeasuredText, MeasuredText | None]:
    """Return the domain's test text and the general text as `choose` makes them, given what a report states of each."""
    first = None if earlier is None else TextLosses(earlier.dataset, earlier.loss)
    second = None if earlier is None else earlier.general
    domain = choose(split.test, split.how, earlier=first)
    return domain, None if general is None else choose(general.source, general.how, earlier=second)
